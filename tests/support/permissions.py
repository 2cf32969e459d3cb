"""Evaluation of IAM policies: by moto, except for the conditions that it does not support."""

import fnmatch
import json
from typing import Any

from moto.iam.access_control import IAMPolicy, PermissionResult


def policies_of(iam: Any, role: str) -> list[str]:
    """The policies of a role, all of which are attached to it, as JSON."""
    assert iam.list_role_policies(RoleName=role)["PolicyNames"] == []
    documents = []
    for policy in iam.list_attached_role_policies(RoleName=role)["AttachedPolicies"]:
        arn = {"PolicyArn": policy["PolicyArn"]}
        version = iam.get_policy(**arn)["Policy"]["DefaultVersionId"]
        documents.append(iam.get_policy_version(**arn, VersionId=version)["PolicyVersion"]["Document"])
    return [document if isinstance(document, str) else json.dumps(document) for document in documents]


def allowed(policies: list[str], action: str, resource: str, **context: str) -> bool:
    """Whether the policies allow an action, by moto; conditions are evaluated here, since moto supports few (5.2.5).

    Args:
        context: condition keys; in their names __ stands for / and _ for a colon.
    """
    known = {key.replace("__", "/").replace("_", ":"): value for key, value in context.items()}
    results = set()
    for policy in map(json.loads, policies):
        policy["Statement"] = [
            part for part in policy["Statement"] if _holds(part.pop("Condition", {}), known)
        ]
        results.add(IAMPolicy(json.dumps(policy)).is_action_permitted(action, resource))
    return PermissionResult.PERMITTED in results and PermissionResult.DENIED not in results


def _holds(condition: dict[str, dict[str, str]], context: dict[str, str]) -> bool:
    assert condition.keys() <= {"StringEquals", "StringLike"}
    wanted = [pair for keys in condition.values() for pair in keys.items()]
    return all(key in context and fnmatch.fnmatchcase(context[key], pattern) for key, pattern in wanted)
