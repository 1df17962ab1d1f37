# SPDX-License-Identifier: Apache-2.0
"""Launch scripts, run dry: the commands they would give."""

import os
import pathlib
import shlex
import subprocess
import tarfile
import time

import jsonschema
import pytest
import yaml

GOLDEN = pathlib.Path(__file__).parent / 'golden' / 'launch.txt'
LAUNCH = pathlib.Path(__file__).parents[1] / 'launch'
SCRIPTS = sorted(LAUNCH.glob('*.sh'))


def launch(script, *arguments, **environment):
  # These tests set, or `make PYTHON=python3.13 test` hands on.
  ours = ('XLA_FLAGS', 'PYTHON')
  usual = {k: v for k, v in os.environ.items() if k not in ours}
  return subprocess.run(
    [LAUNCH / script, *arguments],
    env=usual | environment,
    capture_output=True,
    text=True,
    timeout=60,
  )


def commands(done):
  assert not done.returncode, done.stderr
  return [shlex.split(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize('script', SCRIPTS, ids=lambda p: p.name)
def test_syntax_and_usage(script):
  assert not subprocess.run(['bash', '-n', script]).returncode
  assert os.access(script, os.X_OK)
  done = launch(script.name, IMAGE='i')
  assert done.returncode == 2 and 'usage: ' in done.stderr


def test_local_names_the_processes():
  first, second = commands(
    launch(
      'local.sh',
      *('--dry-run', '--devices', '4', '2', 'python', '--workdir=a b'),
      JAX_COORDINATOR_PORT='1234',
    )
  )
  assert first == [
    'env',
    'JAX_COORDINATOR_ADDRESS=127.0.0.1:1234',
    'JAX_NUM_PROCESSES=2',
    'JAX_PROCESS_ID=0',
    'JAX_PLATFORMS=cpu',
    'JAX_NUM_CPU_DEVICES=4',
    'python',
    '--workdir=a b',
  ]
  assert second[3] == 'JAX_PROCESS_ID=1' and second[4:] == first[4:]


def test_local_stops_all_when_one_fails():
  start = time.time()
  script = 'if [ $JAX_PROCESS_ID = 1 ]; then exit 3; else exec sleep 50; fi'
  assert launch('local.sh', '3', 'sh', '-c', script).returncode == 3
  assert time.time() - start < 30


@pytest.mark.parametrize('_', range(20))  # the signal may come at any moment
def test_local_passes_sigterm_on(_):
  script = 'trap "exit 75" TERM; echo up; while :; do sleep 0.1; done'
  with subprocess.Popen(
    [LAUNCH / 'local.sh', '2', 'sh', '-c', script], stdout=subprocess.PIPE
  ) as parent:
    for _ in range(2):
      assert parent.stdout.readline() == b'up\n'
    parent.terminate()
    assert parent.wait(timeout=30) == 75


def test_slurm_runs_one_process_a_gpu_and_queues_again():
  (command,) = commands_of_one(
    launch(
      'slurm.sh',
      *('--dry-run', '--nodes=4', '--', '--config=c.py', '--workdir=/a b'),
      GPUS_PER_NODE='4',
      PYTHON='python',
    )
  )
  assert command[0] == 'sbatch' and '--nodes=4' in command
  assert '--ntasks-per-node=4' in command and '--signal=TERM@180' in command
  job = command[-1].splitlines()
  assert shlex.split(job[0])[3:] == [
    *('python', '-m', 'drnet_jax.main', '--config=c.py', '--workdir=/a b')
  ]
  assert 'scontrol requeue' in job[3]


@pytest.mark.parametrize('status', [0, 2, 75, 76, 134, 137])
def test_slurm_queues_again_what_can_go_on(tmp_path, status):
  for name, line in (
    ('srun', f'exit {status}'),
    ('scontrol', f'echo "$@" > {tmp_path}/queued'),
  ):
    (tmp_path / name).write_text(f'#!/bin/sh\n{line}\n')
    (tmp_path / name).chmod(0o755)
  (command,) = commands_of_one(
    launch('slurm.sh', '--dry-run', '--', '--config=c.py', '--workdir=w')
  )
  done = subprocess.run(
    ['sh', '-c', command[-1]],  # as of --wrap
    env={'PATH': f'{tmp_path}:/usr/bin:/bin', 'SLURM_JOB_ID': '7'},
  )
  assert done.returncode == status
  assert (tmp_path / 'queued').exists() == (status not in (0, 2))
  # Or it would kill with 137 who is about to leave with 2.
  assert '--kill-on-bad-exit=0' in command[-1]


def commands_of_one(done):
  """As `commands`, of a dry run whose one command has several lines."""
  assert not done.returncode, done.stderr
  # What bash's %q writes of a line break, only bash reads.
  words = subprocess.run(
    ['bash', '-c', f'printf "%s\\0" {done.stdout}'],
    capture_output=True,
    text=True,
  )
  return [words.stdout.split('\0')[:-1]]


def test_tpu_pod(tmp_path):
  where = {'NAME': 'n', 'ZONE': 'z', 'TYPE': 'v5p-32', 'VERSION': 'v'}

  def dry(*arguments):
    return commands(launch('tpu_pod.sh', '--dry-run', *arguments, **where))

  (created,) = dry('create', '--spot')
  assert created[:6] == 'gcloud compute tpus queued-resources create n'.split()
  assert '--accelerator-type=v5p-32' in created and created[-1] == '--spot'
  (trained,) = dry('train', '--config=c.py', '--workdir=/mnt/a b')
  assert '--worker=all' in trained
  inner = trained[-1].removeprefix('--command=')
  assert shlex.split(inner)[-2:] == ['--config=c.py', '--workdir=/mnt/a b']
  packed, copied, unpacked, installed = dry('install')
  assert copied[:5] == 'gcloud compute tpus tpu-vm scp'.split()
  for command in (copied, unpacked, installed):
    assert '--worker=all' in command
  # What is sent is what was written, not what was installed or trained.
  source = tmp_path / 'source'
  for name in ('drnet_jax/a.py', 'mine/b.py', '.venv/c', '.git/d', 'runs/e'):
    (source / name).parent.mkdir(parents=True)
    (source / name).touch()
  packed[2] = str(tmp_path / 'sent.tgz')
  packed[packed.index('-C') + 1] = str(source)
  subprocess.run(packed, check=True)
  with tarfile.open(packed[2]) as file:
    names = {x.name for x in file.getmembers() if x.isfile()}
  assert names == {'./drnet_jax/a.py', './mine/b.py'}
  assert dry('delete')[0][4] == 'delete'


def test_gke_fills_in_its_manifest():
  stages = "--config.stages=('finetune',)"
  done = launch('gke.sh', '--dry-run', '--workdir=/data/r', stages, IMAGE='img')
  assert not done.returncode, done.stderr
  assert '${' not in done.stdout
  assert 'image: img' in done.stdout and 'completions: 4' in done.stdout
  (line,) = (x for x in done.stdout.splitlines() if 'command: ' in x)
  # YAML's single quotes, then the shell's quoting.
  inner = line.split("'", 1)[1].rsplit("'", 1)[0].replace("''", "'")
  assert shlex.split(inner)[-2:] == ['--workdir=/data/r', stages]


FLAGS = ('--config=c.py', '--workdir=/mnt/a b')
DRY_RUNS = [
  ('local.sh', '2', 'python', *FLAGS),
  ('slurm.sh', '--nodes=4', '--', *FLAGS),
  ('tpu_pod.sh', 'create', '--spot', '--valid-until-duration=6h'),
  ('tpu_pod.sh', 'install'),
  ('tpu_pod.sh', 'train', *FLAGS),
  ('tpu_pod.sh', 'delete'),
  ('gke.sh', *FLAGS),
  ('gpu_suite.sh', '/data/packed.npz', '--weights=w.npz'),
]


def dry_runs() -> str:
  """What every script would do. `python tests/test_launch.py` keeps it."""
  parts = []
  for script, *arguments in DRY_RUNS:
    done = launch(
      script,
      '--dry-run',
      *arguments,
      IMAGE='image',
      JAX_COORDINATOR_PORT='1234',
    )
    assert not done.returncode, done.stderr
    parts += [f'$ {script} {shlex.join(arguments)}', done.stdout]
  return '\n'.join(parts).replace(str(LAUNCH.parent), '<root>')


def test_dry_runs_are_as_kept():
  assert dry_runs() == GOLDEN.read_text()


def test_what_ends_the_gpu_suite_ends_what_it_started(tmp_path):
  # In place of Python: says who it is, and goes on for long.
  python = tmp_path / 'python'
  python.write_text('#!/bin/sh\necho $$ > "$SAID"\nexec sleep 100\n')
  python.chmod(0o755)
  said = tmp_path / 'said'
  suite = subprocess.Popen(
    [LAUNCH / 'gpu_suite.sh', 'packed.npz'],
    env=os.environ | {'PYTHON': str(python), 'SAID': str(said)},
  )
  try:
    while not said.exists() or not said.read_text():
      time.sleep(0.01)
    suite.terminate()
    assert suite.wait(20)
    with pytest.raises(ProcessLookupError):
      os.kill(int(said.read_text()), 0)
  finally:
    suite.kill()
    suite.wait()


# JobSet v1alpha2, its own part: what we use of the CustomResourceDefinition in
# kubernetes-sigs/jobset, kept by hand, for no validator on PyPI knows it.
JOBSET = {
  'type': 'object',
  'required': ['apiVersion', 'kind', 'metadata', 'spec'],
  'additionalProperties': False,
  'properties': {
    'apiVersion': {'const': 'jobset.x-k8s.io/v1alpha2'},
    'kind': {'const': 'JobSet'},
    'metadata': {'type': 'object', 'required': ['name']},
    'spec': {
      'type': 'object',
      'additionalProperties': False,
      'properties': {
        'failurePolicy': {
          'type': 'object',
          'additionalProperties': False,
          'properties': {
            'maxRestarts': {'type': 'integer'},
            'rules': {
              'type': 'array',
              'items': {
                'type': 'object',
                'required': ['action', 'name'],
                'additionalProperties': False,
                'properties': {
                  'name': {
                    'pattern': '^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$'
                  },
                  'action': {
                    'enum': [
                      'FailJobSet',
                      'RestartJobSet',
                      'RestartJobSetAndIgnoreMaxRestarts',
                    ]
                  },
                  'onJobFailureReasons': {
                    'items': {
                      'enum': [
                        'BackoffLimitExceeded',
                        'DeadlineExceeded',
                        'FailedIndexes',
                        'MaxFailedIndexesExceeded',
                        'PodFailurePolicy',
                      ]
                    }
                  },
                  'targetReplicatedJobs': {'type': 'array'},
                },
              },
            },
          },
        },
        'replicatedJobs': {
          'type': 'array',
          'items': {
            'type': 'object',
            'required': ['name', 'template'],
            'additionalProperties': False,
            'properties': {
              'name': {'type': 'string'},
              'replicas': {'type': 'integer'},
              'template': {'type': 'object', 'required': ['spec']},
            },
          },
        },
      },
    },
  },
}


def manifest():
  done = launch('gke.sh', '--dry-run', *FLAGS, IMAGE='image')
  return yaml.safe_load(done.stdout)


def test_the_manifest_is_a_jobset():
  jsonschema.validate(manifest(), JOBSET)
  unnamed = manifest()
  del unnamed['spec']['failurePolicy']['rules'][0]['name']
  with pytest.raises(jsonschema.ValidationError, match='name'):
    jsonschema.validate(unnamed, JOBSET)


def test_the_jobs_of_the_manifest_are_jobs():
  kubernetes_validate = pytest.importorskip('kubernetes_validate')
  for replicated in manifest()['spec']['replicatedJobs']:
    job = {
      'apiVersion': 'batch/v1',
      'kind': 'Job',
      'metadata': {'name': replicated['name']},
    } | replicated['template']
    kubernetes_validate.validate(job, '1.33', strict=True)
    job['spec']['completion'] = 4
    with pytest.raises(kubernetes_validate.ValidationError):
      kubernetes_validate.validate(job, '1.33', strict=True)


if __name__ == '__main__':
  GOLDEN.write_text(dry_runs())
