"""Users, tokens and roles."""

import secrets
from dataclasses import dataclass, field

from .wire import HttpError


@dataclass(frozen=True)
class Account:
    """One token of one user. `role` is `"write"` or `"read"`; `orgs` are the organisations the user belongs to."""

    user: str
    role: str
    orgs: tuple[str, ...] = ()

    def owns(self, namespace: str) -> bool:
        return namespace == self.user or namespace in self.orgs


@dataclass
class Accounts:
    tokens: dict[str, Account] = field(default_factory=dict)

    def add(self, user: str, role: str = "write", orgs: tuple[str, ...] = ()) -> str:
        """Register a user (or one more token of a user) and return the new token."""
        if role not in ("write", "read"):
            raise ValueError(f"Unknown role {role!r}: use 'write' or 'read'.")
        token = "hf_" + secrets.token_hex(17)
        self.tokens[token] = Account(user, role, orgs)
        return token

    def authenticate(self, authorization: str | None) -> Account | None:
        """The account behind an `Authorization` header; `None` without one; 401 for a token nobody owns."""
        if not authorization:
            return None
        account = self.tokens.get(authorization.removeprefix("Bearer ").strip())
        if account is None:
            raise HttpError(401, "Invalid credentials in Authorization header")
        return account


def whoami(account: Account) -> dict[str, object]:
    """Body of `GET /api/whoami-v2`."""
    return {
        "type": "user",
        "id": account.user,
        "name": account.user,
        "fullname": account.user,
        "orgs": [{"type": "org", "name": org, "roleInOrg": "write"} for org in account.orgs],
        "auth": {"type": "access_token", "accessToken": {"displayName": "test", "role": account.role}},
    }
