"""infra/aws/with_password.py: the command gets the secret's value in its environment, or does not run."""

import subprocess
import sys
from collections.abc import Iterator

import pytest
from support import processes
from support.cloud import Cloud
from support.servers import LOOPBACK

SCRIPT = processes.REPO / "infra/aws/with_password.py"
ASK = (sys.executable, "-c", "import os; print(os.environ.get('MLFLOW_TRACKING_PASSWORD'))")


@pytest.fixture(scope="module")
def env(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Environment of a machine: AWS, its metadata service, and a secret `ddpm/one` in the machine's region."""
    with Cloud(tmp_path_factory.mktemp("cloud"), LOOPBACK, ("machine", "key")) as cloud:
        cloud.client("secretsmanager").create_secret(Name="ddpm/one", SecretString="of-a-machine")
        yield {
            "AWS_ENDPOINT_URL_SECRETS_MANAGER": cloud.endpoint,
            "AWS_EC2_METADATA_SERVICE_ENDPOINT": cloud.endpoint,
            "AWS_CONFIG_FILE": "/dev/null",
            "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
        }


def run(env: dict[str, str], *command: str) -> subprocess.CompletedProcess[str]:
    return processes.run([sys.executable, SCRIPT, *command], cwd=processes.REPO, env=env)


def test_the_command_gets_the_password_in_its_environment(env: dict[str, str]) -> None:
    done = run(env | {"DDPM_MLFLOW_SECRET": "ddpm/one"}, *ASK)
    assert (done.returncode, done.stdout, done.stderr) == (0, "of-a-machine\n", "")


def test_without_a_secret_name_the_command_just_runs(env: dict[str, str]) -> None:
    done = run({name: "http://127.0.0.1:1" for name in env}, *ASK)
    assert (done.returncode, done.stdout, done.stderr) == (0, "None\n", "")


def test_a_missing_secret_is_an_error_and_nothing_runs(env: dict[str, str]) -> None:
    done = run(env | {"DDPM_MLFLOW_SECRET": "ddpm/another"}, *ASK)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("DDPM_MLFLOW_SECRET is 'ddpm/another', which cannot be read: ")
    assert "ResourceNotFoundException" in done.stderr and done.stderr.count("\n") == 1


def test_the_exit_code_is_that_of_the_command(env: dict[str, str]) -> None:
    assert run(env, sys.executable, "-c", "raise SystemExit(7)").returncode == 7
    assert run(env).returncode == 2
