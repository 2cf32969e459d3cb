"""Run a command that finds MLflow's password in its environment: python with_password.py ray start ...

It is the value of the secret that DDPM_MLFLOW_SECRET names in AWS's Secrets Manager, which the machine's role may read.
From there it goes into MLFLOW_TRACKING_PASSWORD of the command and of all that this starts, and so into no file, no
argument and no log. Without DDPM_MLFLOW_SECRET the command is run as it is.
"""

import os
import sys

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError
from botocore.utils import IMDSRegionProvider

PATIENCE = Config(connect_timeout=5, read_timeout=10, retries={"max_attempts": 8, "mode": "standard"})


def main() -> int:
    command, secret = sys.argv[1:], os.environ.get("DDPM_MLFLOW_SECRET")
    if not command:
        print(__doc__, file=sys.stderr)
        return 2
    if secret:
        try:
            os.environ["MLFLOW_TRACKING_PASSWORD"] = value_of(secret)
        except (BotoCoreError, ClientError, KeyError) as error:
            print(f"DDPM_MLFLOW_SECRET is {secret!r}, which cannot be read: {error}", file=sys.stderr)
            return 1
    os.execvp(command[0], command)


def value_of(secret: str) -> str:
    """Of the region that the environment names, or that the machine is in."""
    session = boto3.Session()
    region = session.region_name or IMDSRegionProvider(session._session).provide()
    client = session.client("secretsmanager", region_name=region, config=PATIENCE)
    return client.get_secret_value(SecretId=secret)["SecretString"]


if __name__ == "__main__":
    sys.exit(main())
