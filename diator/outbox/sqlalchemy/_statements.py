"""The statements of the store."""

from __future__ import annotations

import sqlalchemy as sa

from diator.outbox.sqlalchemy._tables import Dialect

_MESSAGE = "seq, message_id, message_type, message_name, key, event_time, attempts"


class Statements:
    """
    The statements for a pair of tables, which are given as they stand in a statement: quoted, and with their schema.

    What stands in braces differs between the databases: see `Dialect`.
    """

    def __init__(self, words: Dialect, outbox: str, inbox: str, *, on_postgresql: bool, commit_order: bool) -> None:
        self._words, self._outbox, self._on_postgresql = words, outbox, on_postgresql
        now, due = words.now, "dead_reason IS NULL AND available_at"
        positions, lease = words.among.format(":positions"), words.uuid.format(":lease")
        self._is_free = f"o.dead_reason IS NULL AND (o.lease IS NULL OR o.lease_until <= {now})"
        self._materialized = "MATERIALIZED" if on_postgresql else ""
        # True for a row that no open transaction may still precede.
        # Every visible row was written before `pg_snapshot_xmax`, unless it came from another cluster, by a dump or by
        # logical replication: its transaction has no meaning here.
        is_settled = (
            "(o.key IS NULL OR o.tx < CAST(CAST(pg_snapshot_xmin(pg_current_snapshot()) AS text) AS bigint)"
            " OR o.tx >= CAST(CAST(pg_snapshot_xmax(pg_current_snapshot()) AS text) AS bigint))"
            if on_postgresql and commit_order
            else "TRUE"
        )

        self.claim_in_order = {"block": self._claim(is_settled, dead=True), "skip": self._claim(is_settled)}
        self.claim_unordered = self._claim(None)
        self.park = sa.text(
            f"UPDATE {outbox} SET available_at = {words.parked} WHERE seq IN"
            f" ({self._picked(is_settled, dead=True, half=':limit')} SELECT seq FROM picked WHERE behind = 1)"
        )
        self.next_due = sa.text(
            f"SELECT {words.elapsed.format(f'min(available_at) - {now}')} FROM {outbox}"
            f" WHERE {due} > {now} AND available_at < {words.parked}"
        )
        self.delete_sent = sa.text(f"DELETE FROM {outbox} WHERE seq {positions} AND lease = {lease}")
        self.release = sa.text(
            f"UPDATE {outbox} SET lease = NULL, lease_until = NULL, attempts = attempts - 1"
            f" WHERE seq {positions} AND lease = {lease}"
        )
        failures = (
            f"SELECT CAST({words.item.format(0)} AS bigint) AS seq, {words.item.format(1)} AS reason,"
            f" CAST({words.item.format(2)} AS {self._float}) AS retry FROM {words.items.format(':failed')}"
        )
        self.fail = sa.text(
            f"UPDATE {outbox} SET lease = NULL, lease_until = NULL, last_error = f.reason,"
            " dead_reason = CASE WHEN f.retry IS NULL THEN f.reason END,"
            f" dead_at = CASE WHEN f.retry IS NULL THEN {now} END,"
            " available_at = CASE WHEN f.retry IS NULL THEN available_at"
            f" ELSE {now} + {words.seconds.format('f.retry')} END"
            f" FROM ({failures}) AS f WHERE {outbox}.seq = f.seq AND lease = {lease}"
        )

        message_id = words.uuid.format(":message_id")
        self.cancel_scheduled = sa.text(
            f"DELETE FROM {outbox} WHERE message_id = {message_id} AND attempts = 0 AND available_at > {words.at_once}"
        )
        self.cancel_at_once = sa.text(
            f"DELETE FROM {outbox} WHERE message_id = {message_id} AND attempts = 0 AND {due} = {words.at_once}"
        )
        self.note = sa.text(
            f"INSERT INTO {inbox} (group_name, handler, message_id) VALUES (:group, :handler, {message_id})"
            " ON CONFLICT DO NOTHING"
        )
        row = "ctid" if on_postgresql else "rowid"
        self.prune = sa.text(
            f"DELETE FROM {inbox} WHERE {row} IN (SELECT {row} FROM {inbox}"
            f" WHERE handled_at < {now} - {words.seconds.format(':keep')} ORDER BY handled_at LIMIT :limit)"
        )

        self.redrive = sa.text(
            f"UPDATE {outbox} SET attempts = 0, dead_reason = NULL, dead_at = NULL, available_at = {words.at_once}"
            f" WHERE dead_reason IS NOT NULL AND (:all OR seq {positions}) RETURNING key"
        )
        self.discard = sa.text(f"DELETE FROM {outbox} WHERE dead_reason IS NOT NULL AND seq {positions} RETURNING key")
        dead_before = self._before("b.dead_reason IS NOT NULL")
        self.unpark = sa.text(
            f"UPDATE {outbox} AS o SET available_at = {words.at_once}"
            f" WHERE dead_reason IS NULL AND available_at = {words.parked} AND {dead_before} IS NULL"
        )
        self.unpark_all = sa.text(f"UPDATE {outbox} SET available_at = {words.at_once} WHERE {due} = {words.parked}")
        behind = (
            f"LEFT JOIN (SELECT key, min(seq) AS first FROM {outbox} WHERE dead_reason IS NOT NULL GROUP BY key) d"
            " ON d.key = o.key AND d.first < o.seq"
        )
        pending = f"o.{due} <= {now} OR o.{due} = {words.parked}"
        held_back = f"({pending}) AND {self._is_free} AND NOT {is_settled}"
        is_late = f"available_at > created_at AND available_at < {words.parked}"
        since = f"CASE WHEN {is_late} THEN available_at ELSE created_at END"
        self.status = sa.text(
            f"SELECT count(*) FILTER (WHERE {pending}) AS pending,"
            f" {words.elapsed.format(f'{now} - min({since}) FILTER (WHERE {pending})')} AS oldest,"
            f" count(*) FILTER (WHERE dead_reason IS NULL) AS alive,"
            f" count(*) FILTER (WHERE lease_until > {now}) AS leased,"
            f" count(*) FILTER (WHERE dead_reason IS NOT NULL) AS dead,"
            f" count(*) FILTER (WHERE dead_reason IS NULL AND d.first IS NOT NULL) AS blocked,"
            f" (SELECT count(DISTINCT key) FROM {outbox} WHERE dead_reason IS NOT NULL) AS blocked_keys,"
            f" count(*) FILTER (WHERE {held_back}) AS held_back FROM {outbox} o {behind}"
        )
        self.oldest_writer = sa.text(
            "SELECT pid, CAST(EXTRACT(EPOCH FROM clock_timestamp() - xact_start) AS double precision) AS open_for"
            " FROM pg_stat_activity WHERE backend_xid IS NOT NULL AND pid <> pg_backend_pid()"
            " ORDER BY age(backend_xid) DESC LIMIT 1"
        )
        self.dead = sa.text(
            f"SELECT {_MESSAGE}, {words.json.format('headers')} AS headers, {words.json.format('payload')} AS payload,"
            f" created_at AS stored_at, dead_reason, dead_at, (SELECT count(*) FROM {outbox} b"
            f" WHERE b.key = o.key AND b.seq > o.seq AND b.dead_reason IS NULL) AS blocked"
            f" FROM {outbox} o WHERE dead_reason IS NOT NULL AND seq > :after ORDER BY seq LIMIT :limit"
        )

    @property
    def _float(self) -> str:
        return "double precision" if self._on_postgresql else "real"

    def _before(self, condition: str) -> str:
        """
        Return a subquery that has a value if an earlier row with the key of `o` fulfils *condition*.

        Not EXISTS: PostgreSQL would make a join of it, and might read all such rows for each claim.
        """
        return f"(SELECT 1 FROM {self._outbox} b WHERE b.key = o.key AND b.seq < o.seq AND {condition} LIMIT 1)"

    def _picked(self, is_settled: str | None, *, dead: bool, limit: str = ":limit", half: str = ":half") -> str:
        """
        Return the CTE `picked` of rows that are sent next: `seq`, `key`, and whether they are `behind` a dead row.

        Two classes of rows are read in the order of an index: those that waited for a time, which get at most half of
        the claim, and those that may be sent at once. So neither a great backlog nor many messages that were scheduled
        for one time keep the others waiting.
        """
        words, now = self._words, self._words.now
        behind, may_be_sent = "0", self._is_free
        if is_settled is not None:
            tried = self._before("b.attempts > 0 AND b.dead_reason IS NULL")
            may_be_sent = f"{may_be_sent} AND {is_settled} AND {tried} IS NULL"
        if dead:
            behind = f"coalesce({self._before('b.dead_reason IS NOT NULL')}, 0)"
        waited, at_once = (
            f"SELECT o.seq, o.key, {behind} AS behind FROM {self._outbox} o WHERE {may_be_sent} AND {which}"
            f" ORDER BY o.available_at, o.seq LIMIT {most}"
            for which, most in (
                (f"o.available_at > {words.at_once} AND o.available_at <= {now}", half),
                (f"o.available_at = {words.at_once}", f"{limit} - (SELECT count(*) FROM waited)"),
            )
        )
        return (
            f"WITH waited AS {self._materialized} ({waited}), at_once AS {self._materialized} ({at_once}),"
            f" picked AS {self._materialized} (SELECT * FROM waited UNION ALL SELECT * FROM at_once)"
        )

    def _claim(self, is_settled: str | None, *, dead: bool = False) -> sa.TextClause:
        """Return the statement that leases rows, and *parks* those behind a dead one: no later claim reads them."""
        words, table = self._words, self._outbox
        chosen = f"{self._picked(is_settled, dead=dead)} SELECT * FROM picked"
        if self._on_postgresql:
            # A row that the program is just cancelling is locked. It is left out, and so are those behind it. The
            # conditions are here again for a row that was changed since this statement has begun.
            chosen = (
                f"{self._picked(is_settled, dead=dead)}, locked AS MATERIALIZED"
                f" (SELECT p.* FROM {table} o JOIN picked p ON p.seq = o.seq WHERE {self._is_free}"
                " FOR UPDATE OF o SKIP LOCKED) SELECT * FROM locked l WHERE NOT EXISTS (SELECT 1 FROM picked p"
                " WHERE p.key = l.key AND p.seq < l.seq AND NOT EXISTS (SELECT 1 FROM locked e WHERE e.seq = p.seq))"
            )
        # SQLite 3.40 takes `lease IS NOT NULL` for true here.
        payload = f"CASE WHEN {table}.available_at < {words.parked} THEN {words.json.format('payload')} END"
        returned = ", ".join(f"{table}.{column} AS {column}" for column in _MESSAGE.split(", "))
        until = f"{words.now} + {words.seconds.format(':seconds')}"
        return sa.text(
            f"UPDATE {table} SET lease = CASE WHEN c.behind = 0 THEN {words.uuid.format(':lease')} END,"
            f" lease_until = CASE WHEN c.behind = 0 THEN {until} END, attempts = attempts + 1 - c.behind,"
            f" available_at = CASE WHEN c.behind = 0 THEN available_at ELSE {words.parked} END"
            f" FROM ({chosen}) AS c WHERE {table}.seq = c.seq"
            f" RETURNING {returned}, {words.json.format('headers')} AS headers, {payload} AS payload,"
            f" {table}.created_at AS stored_at, {table}.lease AS lease"
        )
