"""Add a user to the MLflow server at MLFLOW_TRACKING_URI: python infra/mlflow/add_user.py NAME

MLFLOW_TRACKING_USERNAME with MLFLOW_TRACKING_PASSWORD must be an admin. The new user's password is NEW_PASSWORD, or
is asked for. The user may read everything, and write to experiments of their own, which is enough for jobs. For an
existing NAME the password is replaced.
"""

import getpass
import os
import sys

import requests


def main() -> int:
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        print(__doc__, file=sys.stderr)
        return 2
    uri, name = os.environ.get("MLFLOW_TRACKING_URI", "").rstrip("/"), sys.argv[1]
    if not uri.startswith("http"):
        print(f"MLFLOW_TRACKING_URI is {uri!r}; it must name an MLflow server", file=sys.stderr)
        return 2
    password = os.environ.get("NEW_PASSWORD") or getpass.getpass(f"new password of {name}: ")
    try:
        answer = ask("POST", f"{uri}/api/2.0/mlflow/users/create", name, password)
        if "RESOURCE_ALREADY_EXISTS" in answer.text:
            answer = ask("PATCH", f"{uri}/api/2.0/mlflow/users/update-password", name, password)
    except requests.RequestException as error:
        print(f"{uri} cannot be reached: {type(error).__name__}", file=sys.stderr)
        return 1
    if not answer.ok:
        print(
            f"{uri} refuses the request (HTTP {answer.status_code}): {' '.join(answer.text.split())[:300]}",
            file=sys.stderr,
        )
        return 1
    print(f"{name} may log in")
    return 0


def ask(method: str, url: str, username: str, password: str) -> requests.Response:
    auth = (os.environ.get("MLFLOW_TRACKING_USERNAME", ""), os.environ.get("MLFLOW_TRACKING_PASSWORD", ""))
    return requests.request(
        method, url, json={"username": username, "password": password}, auth=auth, timeout=30
    )


if __name__ == "__main__":
    sys.exit(main())
