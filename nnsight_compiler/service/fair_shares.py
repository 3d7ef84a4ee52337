"""Who is next: weighted fair shares between tenants, by start-time fair queueing.

Goyal, Vin and Cheng, "Start-time Fair Queuing" (SIGCOMM 1996), section 2. A job gets a tag when it is submitted: the
later of the queue's virtual time and of the finish of its tenant's job before it. Its own finish is the tag plus its
share of the work over its tenant's weight. The lowest tag is next; the virtual time is the tag of what was begun last.
While two tenants both wait, what they got differs, over their weights, by no more than one job of each: a tenant with a
thousand jobs does not hold up the one that brings its first.
"""

from __future__ import annotations

from typing import final

from nnsight_compiler.service.database import Database, Row
from nnsight_compiler.service.tenants import Tenant

NEXT = "SELECT * FROM jobs WHERE state = 'queued' ORDER BY tag, number LIMIT 1"
MATES = (
    "SELECT * FROM jobs WHERE state = 'queued' AND model = ? AND batch = ? AND attempts = 0 AND number != ? "
    "ORDER BY tag, number LIMIT ?"
)
AHEAD = "SELECT count(*) FROM jobs WHERE state = 'queued' AND (tag, number) < (?, ?)"
BEHIND = "UPDATE jobs SET tag = max(?, tag - ?) WHERE tenant = ? AND state = 'queued' AND number > ?"
KNOWN = (
    "INSERT INTO tenants (name, weight, limits) VALUES (?, ?, ?) "
    "ON CONFLICT (name) DO UPDATE SET weight = excluded.weight, limits = excluded.limits "
    "WHERE weight != excluded.weight OR limits != excluded.limits"
)


@final
class FairShares:
    """The order of the queue. Every method belongs into a transaction of its caller."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def know(self, tenant: Tenant) -> None:
        """Records a tenant, or its new weight and limits; they count for what it submits from now on."""
        self._database.execute(KNOWN, tenant.name, tenant.weight, tenant.limits.as_json())

    def charge(self, tenant: Tenant, share: float) -> tuple[float, float]:
        """The tag of a job that is submitted now, and what its tenant is charged for it."""
        finish = self._database.number("SELECT finish FROM tenants WHERE name = ?", tenant.name)
        tag, charge = max(self._virtual(), finish), share / tenant.weight
        self._database.execute("UPDATE tenants SET finish = ? WHERE name = ?", tag + charge, tenant.name)
        return tag, charge

    def withdraw(self, job: Row) -> None:
        """Gives back what was charged for a job that will not run: its tenant's later jobs move up."""
        charge, virtual = job["charge"], self._virtual()
        self._database.execute(BEHIND, virtual, charge, job["tenant"], job["number"])
        self._database.execute(
            "UPDATE tenants SET finish = max(?, finish - ?) WHERE name = ?", virtual, charge, job["tenant"]
        )

    def next(self, most: int) -> list[Row]:
        """The job that is next, and up to `most` with those that may run with it, of any tenants.

        What ran before and did not end well runs alone, so that it can take no others with it again.
        """
        head = self._database.row(NEXT)
        if head is None:
            return []
        self._database.execute("UPDATE shares SET virtual = max(virtual, ?)", head["tag"])
        if head["attempts"]:
            return [head]
        return [head, *self._database.rows(MATES, head["model"], head["batch"], head["number"], max(0, most - 1))]

    def place(self, job: Row) -> int:
        """How many jobs are begun until this one is, itself counted; 0 where it does not wait."""
        if job["state"] != "queued":
            return 0
        return int(self._database.number(AHEAD, job["tag"], job["number"])) + 1

    def _virtual(self) -> float:
        return self._database.number("SELECT virtual FROM shares")
