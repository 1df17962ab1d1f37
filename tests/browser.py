# SPDX-License-Identifier: Apache-2.0
"""Headless Chromium without a network, for the tests of our pages."""

import json
import shutil

import pytest


def open_chromium(folder, *, width: int):
  """A browser that reaches this machine only; skips the test without one.

  Args:
    folder: an empty one, for the browser's profile.
    width: of the window, in px.

  Returns:
    Selenium's driver; `quit` it.
  """
  selenium = pytest.importorskip('selenium.webdriver')
  browser, driver = map(shutil.which, ('chromium', 'chromedriver'))
  if not (browser and driver):
    pytest.skip('there is no chromium with its chromedriver')
  options = selenium.ChromeOptions()
  options.binary_location = browser
  for flag in (
    'headless=new',
    'no-sandbox',
    'disable-gpu',
    'no-first-run',
    'disable-background-networking',
    'disable-component-update',
    'disable-sync',
    'host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1',
    f'user-data-dir={folder}',
    f'window-size={width},900',
  ):
    options.add_argument(f'--{flag}')
  logs = {'performance': 'ALL', 'browser': 'ALL'}
  options.set_capability('goog:loggingPrefs', logs)
  driver = selenium.Chrome(
    options=options, service=selenium.ChromeService(driver)
  )
  # Windows have a least width; pages need not.
  driver.execute_cdp_cmd(
    'Emulation.setDeviceMetricsOverride',
    {'width': width, 'height': 900, 'deviceScaleFactor': 1, 'mobile': False},
  )
  return driver


def requests(driver) -> list[str]:
  """Addresses asked for since the last call, but for the browser's own."""
  messages = [
    json.loads(entry['message'])['message']
    for entry in driver.get_log('performance')
  ]
  return [
    message['params']['request']['url']
    for message in messages
    if message['method'] == 'Network.requestWillBeSent'
    and message['params']['request']['url'].startswith(('http', 'ws', 'file'))
  ]


def errors(driver) -> list[str]:
  """What the console says is wrong."""
  return [
    entry['message']
    for entry in driver.get_log('browser')
    if entry['level'] == 'SEVERE'
  ]
