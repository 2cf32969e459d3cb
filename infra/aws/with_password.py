"""Run a command with MLflow's password in its environment: python with_password.py ray start ...

The password is the value of the secret DDPM_MLFLOW_SECRET in AWS's Secrets Manager, which the machine's role may
read. It is passed as MLFLOW_TRACKING_PASSWORD to the command and its children, and is in no file, argument or log.
Without DDPM_MLFLOW_SECRET the command runs unchanged.
"""

import os
import sys

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError
from botocore.utils import IMDSRegionProvider

CLIENT = Config(connect_timeout=5, read_timeout=10, retries={"max_attempts": 8, "mode": "standard"})


def main() -> int:
    command, secret = sys.argv[1:], os.environ.get("DDPM_MLFLOW_SECRET")
    if not command:
        print(__doc__, file=sys.stderr)
        return 2
    if secret:
        # boto's default is one attempt of a second; the command inherits these.
        os.environ.setdefault("AWS_METADATA_SERVICE_TIMEOUT", "5")
        os.environ.setdefault("AWS_METADATA_SERVICE_NUM_ATTEMPTS", "3")
        try:
            os.environ["MLFLOW_TRACKING_PASSWORD"] = value_of(secret)
        except (BotoCoreError, ClientError, KeyError) as error:
            print(f"DDPM_MLFLOW_SECRET is {secret!r}, which cannot be read: {error}", file=sys.stderr)
            return 1
    os.execvp(command[0], command)


def value_of(secret: str) -> str:
    """Value of a secret in the region of the environment or of the machine."""
    session = boto3.Session()
    region = session.region_name or IMDSRegionProvider(session._session).provide()
    client = session.client("secretsmanager", region_name=region, config=CLIENT)
    return client.get_secret_value(SecretId=secret)["SecretString"]


if __name__ == "__main__":
    sys.exit(main())
