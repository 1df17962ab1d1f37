# SPDX-License-Identifier: Apache-2.0
"""The demo page in a real browser."""

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request

import browser
import pytest
from conftest import pictures
from PIL import Image
from records import calibration_of

from drnet_jax import mesh as mesh_lib
from drnet_jax.run import workdir
from drnet_jax.serve.classifier import Classifier

pytestmark = pytest.mark.slow


@pytest.fixture(scope='module')
def calibrated(run, tmp_path_factory):
  """The workdir with a calibration and examples."""
  path = str(tmp_path_factory.mktemp('demo') / 'run')
  shutil.copytree(run, path)
  images = pictures(100, side=64)
  trained = workdir.load(path, mesh_lib.create(1))
  calibration_of(trained, images).write(path)
  examples = os.path.join(path, 'report', 'examples')
  os.makedirs(examples)
  for i in range(3):
    Image.fromarray(images[i]).save(os.path.join(examples, f'{i}.png'))
  return path


# Where nobody answers, for all that a proxy may be meant for.
NOWHERE = {
  case(f'{kind}_proxy'): f'{scheme}://127.0.0.1:9'
  for kind, scheme in {'http': 'http', 'https': 'http', 'all': 'socks5'}.items()
  for case in (str.lower, str.upper)
}


@pytest.fixture(scope='module')
def address(calibrated):
  """Of the page, served by the command, which is behind a proxy."""
  pytest.importorskip('gradio')
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    port = free.getsockname()[1]
  served = subprocess.Popen(
    [
      *(sys.executable, '-m', 'drnet_jax', 'demo'),
      *(f'--workdir={calibrated}', f'--port={port}'),
    ],
    env=os.environ | NOWHERE,
  )
  url = f'http://127.0.0.1:{port}/'
  try:
    for _ in range(240):
      assert served.poll() is None
      try:
        urllib.request.urlopen(url, timeout=5).close()
        break
      except OSError:
        time.sleep(0.5)
    else:
      raise AssertionError('the page does not answer')
    yield url
  finally:
    served.terminate()
    served.wait(30)


class Page:
  """The page as its reader sees it."""

  def __init__(self, driver, url):
    self.driver = driver
    driver.get(url)
    self.until(lambda: self.find('#answers p'))

  def find(self, selector):
    return self.driver.find_elements('css selector', selector)

  def until(self, condition, seconds=60):
    last = time.monotonic() + seconds
    while time.monotonic() < last:
      if found := condition():
        return found
      time.sleep(0.2)
    raise AssertionError('nothing changed on the page')

  def upload(self, *files):
    self.find('#files input[type=file]')[0].send_keys('\n'.join(files))

  def options(self):
    """What each image was run at, as far as there is an answer."""
    return self.driver.execute_script(
      "return [...document.querySelectorAll('.card')].map("
      'x => x.dataset.option)'
    )

  def titles(self):
    """Names of the images that are answered."""
    return [x.text for x in self.find('.card h3')]

  def move_slider(self, key):
    self.find('#budget input[type=range]')[0].send_keys(key)


def test_the_page_is_served_behind_any_proxy(address):
  """Also where there is no browser."""
  with urllib.request.urlopen(address) as page:
    assert b'drnet_jax' in page.read()


@pytest.mark.parametrize('width', [390, 1280])
def test_an_afternoon_at_the_page(calibrated, address, tmp_path, width):
  from selenium.webdriver.common.keys import Keys

  classifier = Classifier.load(calibrated, runtime='jax', batch=1)
  points = classifier.calibration.points['GMACs']['best']
  image = str(tmp_path / 'image.png')
  Image.fromarray(pictures(1, side=64, seed=3)[0]).save(image)
  broken = tmp_path / 'broken.png'
  broken.write_bytes(b'no image')
  driver = browser.open_chromium(tmp_path / 'profile', width=width)
  try:
    page = Page(driver, address)
    # It opens with an answer.
    page.until(lambda: page.titles() == ['0.png'])
    (first,) = classifier.predict(
      [os.path.join(calibrated, 'report', 'examples', '0.png')]
    )
    assert page.options() == [first.option]
    page.upload(image)
    (expected,) = classifier.predict([image])
    page.until(lambda: page.titles() == ['image.png'])
    assert page.options() == [expected.option]
    assert expected.name == page.find('.card .answer b')[0].text
    drawn = driver.execute_script(
      "const x = document.querySelector('.card .first img');"
      'return [x.naturalWidth, x.clientWidth,'
      'getComputedStyle(x).imageRendering]'
    )
    assert drawn[0] == expected.size_px < drawn[1]
    assert drawn[2] == 'pixelated'
    # The budget, from end to end; then one size for all.
    page.move_slider(Keys.HOME)
    page.until(lambda: '16 px 100 %' in page.find('#promise')[0].text)
    page.until(lambda: page.options() == ['16 px'])
    page.move_slider(Keys.END)
    promised = f'gets {100 * points[-1].top1:.1f} % right'
    page.until(lambda: promised in page.find('#promise')[0].text)
    classifier.policy = points[-1].policy
    (expected,) = classifier.predict([image])
    page.until(lambda: page.options() == [expected.option])
    page.find('#way input')[3].click()
    page.until(lambda: page.options() == ['32 px'])
    # One of the examples instead, then a file that is none.
    page.find('#examples img')[1].click()
    page.until(lambda: '1.png' in page.find('.card h3')[0].text)
    assert page.options() == ['32 px']
    page.find('#files button[aria-label="Clear"]')[0].click()
    page.until(lambda: page.find('#files input[type=file]'))
    page.upload(str(broken))
    (alert,) = page.until(lambda: page.find('[role=alert]'))
    assert alert.text == 'cannot read broken.png as an image: no known format'
    # It fits, asks nobody else for anything, and is content.
    assert driver.execute_script(
      'return document.documentElement.scrollWidth <= window.innerWidth'
    )
    asked = browser.requests(driver)
    assert asked and all(url.startswith(address) for url in asked)
    assert browser.errors(driver) == []
  finally:
    driver.quit()
