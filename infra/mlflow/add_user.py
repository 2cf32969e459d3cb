"""Let somebody in: python infra/mlflow/add_user.py NAME, at the server that MLFLOW_TRACKING_URI names.

Asks as MLFLOW_TRACKING_USERNAME with MLFLOW_TRACKING_PASSWORD, who must be an admin. The new user's password is
NEW_PASSWORD, or what is typed. Such a user may look at everything, and write to the experiments that they make: what
jobs should have, since they need no more. Again for the same NAME, that user gets the new password.
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
        print(f"{uri} cannot be asked: {type(error).__name__}", file=sys.stderr)
        return 1
    if not answer.ok:
        print(
            f"{uri} refuses (HTTP {answer.status_code}): {' '.join(answer.text.split())[:300]}",
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
