"""The statements of the store."""

from __future__ import annotations

import sqlalchemy as sa

from diator.outbox.sqlalchemy._tables import Dialect
from diator.outbox.store import OnDead, Order

#: `b` has the key of `o`, and comes before it.
_EARLIER = "b.key = o.key AND b.seq < o.seq"
#: `b` was claimed, and is not dead: it is leased, or waits for a retry, or may be claimed again.
_TRIED = "b.attempts > 0 AND b.dead_reason IS NULL"
_UNLEASED = "(o.lease IS NULL OR o.lease_until <= {})"
_MESSAGE = "seq, message_id, message_type, message_name, key, event_time, attempts"


#: How many rows of each class a claim looks at, and how many are parked or brought back at a time. A claim looks at
#: further rows only after those in the way were parked.
WINDOW = 2_000


class Statements:
    """
    The statements for a pair of tables, which are given as they stand in a statement: quoted, and with their schema.

    What differs between the databases is in `Dialect`.
    """

    def __init__(self, words: Dialect, outbox: str, inbox: str, *, on_postgresql: bool) -> None:
        self._words, self._outbox, self._on_postgresql = words, outbox, on_postgresql
        now, positions, lease = words.now, words.among.format(":positions"), words.uuid.format(":lease")
        self._is_free = f"o.dead_reason IS NULL AND {_UNLEASED.format(now)}"
        # A row that the program has changed, such as by `cancel`, is not waited for.
        skip_locked = " FOR UPDATE SKIP LOCKED" if on_postgresql else ""
        # A row with a key, and perhaps an earlier one of an open transaction, waits for that: see `settled`.
        is_settled = "(o.key IS NULL OR o.seq <= :settled)" if on_postgresql else "TRUE"
        waits = f"CASE WHEN b.lease_until > {now} THEN 2 WHEN b.available_at > {now} THEN 1 ELSE 0 END"
        # What the first row with the key of `o` that was tried does: 2 if it is leased, 1 if it waits for its retry,
        # and 0 if it may be claimed. A claim does not see it then if it comes in the index behind too many others.
        tried = f"(SELECT {waits} FROM {outbox} b WHERE {_EARLIER} AND {_TRIED} ORDER BY b.seq LIMIT 1)"
        busy = self._before(f"{_TRIED} AND (b.lease_until > {now} OR b.available_at > {now})")
        dead, parked = self._before("b.dead_reason IS NOT NULL"), self._before(f"b.available_at = {words.parked}")
        is_behind: dict[OnDead, str] = {"block": f"{dead} IS NOT NULL OR {tried}", "skip": f"{tried}"}

        is_first = f"{is_settled} AND (o.key IS NULL OR ({parked} IS NULL AND {busy} IS NULL"
        unordered = self._claim("TRUE", in_order=False)
        self.claim: dict[Order, dict[OnDead, sa.TextClause]] = {
            "key": {"block": self._claim(f"{is_first} AND {dead} IS NULL))"), "skip": self._claim(f"{is_first}))")},
            "none": {"block": unordered, "skip": unordered},
        }
        available = f"FROM {outbox} o WHERE {self._is_free} AND o.available_at <= {now} ORDER BY o.available_at, o.seq"
        self.park: dict[OnDead, sa.TextClause] = {
            on_dead: sa.text(
                f"UPDATE {outbox} SET available_at = {words.parked} WHERE seq IN (SELECT o.seq FROM"
                f" (SELECT o.seq, o.key {available} LIMIT {WINDOW}) o"
                f" WHERE o.key IS NOT NULL AND ({parked} IS NOT NULL OR {behind} < 2){skip_locked})"
            )
            for on_dead, behind in is_behind.items()
        }
        # Not `= parked`: the primary key has this order as well, and has all other rows, too.
        some_parked = (
            f"SELECT seq, key FROM {outbox} WHERE dead_reason IS NULL AND available_at >= {words.parked}"
            " ORDER BY available_at, seq LIMIT :limit"
        )
        unpark = f"UPDATE {outbox} SET available_at = {words.at_once} WHERE seq IN"
        self.unpark_free: dict[OnDead, sa.TextClause] = {
            on_dead: sa.text(
                f"{unpark} (SELECT o.seq FROM ({some_parked}) o WHERE NOT coalesce({behind} >= 0, FALSE){skip_locked})"
            )
            for on_dead, behind in is_behind.items()
        }
        self.unpark_all = sa.text(f"{unpark} (SELECT o.seq FROM ({some_parked}) o{skip_locked})")
        self.unpark_next = sa.text(
            f"{unpark} (SELECT seq FROM {outbox} WHERE available_at = {words.parked} AND key = :key"
            f" ORDER BY seq LIMIT {WINDOW}{skip_locked})"
        )
        next_due = f"SELECT min(o.available_at) FROM {outbox} o WHERE o.dead_reason IS NULL AND o.available_at > {now}"
        held_since = f"SELECT min(o.created_at) FROM (SELECT o.* {available} LIMIT {WINDOW}) o WHERE NOT {is_settled}"
        self.look = sa.text(
            f"SELECT {words.elapsed.format(f'({next_due} AND o.available_at < {words.parked}) - {now}')} AS next_due,"
            f" {words.elapsed.format(f'{now} - ({held_since})')} AS held_for,"
            f" EXISTS (SELECT 1 FROM {outbox} WHERE available_at = {words.parked}) AS is_parked,"
            f" EXISTS (SELECT 1 {available} LIMIT 1 OFFSET {WINDOW}) AS is_long"
        )

        has_parked = (
            f"(SELECT 1 FROM {outbox} p WHERE p.key = {outbox}.key AND p.available_at = {words.parked} LIMIT 1)"
        )
        self.delete_sent = sa.text(
            f"DELETE FROM {outbox} WHERE seq {positions} AND lease = {lease}"
            f" RETURNING seq, key, {has_parked} AS has_parked"
        )
        self.release = sa.text(
            f"UPDATE {outbox} SET lease = NULL, lease_until = NULL, attempts = attempts - 1"
            f" WHERE seq {positions} AND lease = {lease} RETURNING seq, key, NULL AS has_parked"
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
            f" RETURNING {outbox}.seq AS seq, {outbox}.key AS key, {has_parked} AS has_parked"
        )

        cancelled = f"DELETE FROM {outbox} WHERE message_id = {words.uuid.format(':message_id')} AND attempts = 0"
        returned = f"RETURNING key, {has_parked} AS has_parked"
        self.cancel_scheduled = sa.text(f"{cancelled} AND available_at > {words.at_once} {returned}")
        self.cancel_at_once = sa.text(
            f"{cancelled} AND dead_reason IS NULL AND available_at = {words.at_once} {returned}"
        )
        self.note = sa.text(
            f"INSERT INTO {inbox} (group_name, handler, message_id)"
            f" VALUES (:group, :handler, {words.uuid.format(':message_id')}) ON CONFLICT DO NOTHING"
        )
        row = "ctid" if on_postgresql else "rowid"
        self.prune = sa.text(
            f"DELETE FROM {inbox} WHERE {row} IN (SELECT {row} FROM {inbox}"
            f" WHERE handled_at < {now} - {words.seconds.format(':keep')} ORDER BY handled_at LIMIT :limit)"
        )

        self.redrive = sa.text(
            f"UPDATE {outbox} SET attempts = 0, dead_reason = NULL, dead_at = NULL, available_at = {words.at_once}"
            f" WHERE dead_reason IS NOT NULL AND (:all OR seq {positions}) RETURNING key, {has_parked} AS has_parked"
        )
        self.discard = sa.text(f"DELETE FROM {outbox} WHERE dead_reason IS NOT NULL AND seq {positions} {returned}")
        behind = (
            f"LEFT JOIN (SELECT key, min(seq) AS first FROM {outbox} WHERE dead_reason IS NOT NULL GROUP BY key) d"
            " ON d.key = o.key AND d.first < o.seq"
        )
        pending = f"o.dead_reason IS NULL AND (o.available_at <= {now} OR o.available_at = {words.parked})"
        is_late = f"available_at > created_at AND available_at < {words.parked}"
        since = f"min(CASE WHEN {is_late} THEN available_at ELSE created_at END) FILTER (WHERE {pending})"
        self.status = sa.text(
            f"SELECT count(*) FILTER (WHERE {pending}) AS pending,"
            f" {words.elapsed.format(f'{now} - {since}')} AS oldest,"
            " count(*) FILTER (WHERE dead_reason IS NULL) AS alive,"
            f" count(*) FILTER (WHERE lease_until > {now}) AS leased,"
            " count(*) FILTER (WHERE dead_reason IS NOT NULL) AS dead,"
            " count(*) FILTER (WHERE dead_reason IS NULL AND d.first IS NOT NULL) AS blocked,"
            f" (SELECT count(DISTINCT key) FROM {outbox} WHERE dead_reason IS NOT NULL) AS blocked_keys,"
            f" count(*) FILTER (WHERE {pending} AND {self._is_free} AND NOT {is_settled}) AS held_back"
            f" FROM {outbox} o {behind}"
        )
        self.dead = sa.text(
            f"SELECT {_MESSAGE}, {words.json.format('headers')} AS headers, {words.json.format('payload')} AS payload,"
            f" created_at AS stored_at, dead_reason, dead_at, (SELECT count(*) FROM {outbox} b"
            " WHERE b.key = o.key AND b.seq > o.seq AND b.dead_reason IS NULL) AS blocked"
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
        return f"(SELECT 1 FROM {self._outbox} b WHERE {_EARLIER} AND {condition} LIMIT 1)"

    def _claim(self, may_be_sent: str, *, in_order: bool = True) -> sa.TextClause:
        """
        Return the statement that leases rows for which *may_be_sent* is true.

        Two classes of rows are read in the order of an index: those that waited for a time, which get at most half of
        the claim, and those that may be sent at once. So neither a great backlog nor many messages that were scheduled
        for one time keep the others waiting.
        """
        words, now, table, as_ = self._words, self._words.now, self._outbox, "AS MATERIALIZED"
        columns = "o.seq, o.key"
        # Not `= at_once`: the primary key has this order as well, and has the rows that wait, too.
        waited, at_once = (
            f"SELECT o.seq, o.key FROM (SELECT {columns} FROM {table} o WHERE {self._is_free} AND {which}"
            f" ORDER BY o.available_at, o.seq LIMIT {WINDOW}) o WHERE {may_be_sent} LIMIT {most}"
            for which, most in (
                (f"o.available_at > {words.at_once} AND o.available_at <= {now}", ":half"),
                (f"o.available_at <= {words.at_once}", ":limit - (SELECT count(*) FROM waited)"),
            )
        )
        chosen = (
            f"WITH waited {as_} ({waited}), at_once {as_} ({at_once}),"
            f" picked {as_} (SELECT * FROM waited UNION ALL SELECT * FROM at_once)"
        )
        source = "picked"
        if self._on_postgresql:
            # A row that the program is just cancelling is locked, and left out. The conditions are here again for a row
            # that was changed since this statement has begun. A join might read all rows to find these, and so does
            # `dead_reason IS NULL`, which another index serves.
            source = "locked"
            chosen += (
                f", locked {as_} (SELECT p.* FROM picked p, LATERAL (SELECT 1 FROM {table} o WHERE o.seq = p.seq"
                f" AND num_nonnulls(o.dead_reason) = 0 AND {_UNLEASED.format(now)} FOR UPDATE SKIP LOCKED) l)"
            )
        chosen += f" SELECT o.seq FROM {source} o"
        if in_order:  # nor are rows behind one that was left out, or for which there was no room
            tried = self._before(f"{_TRIED} AND NOT EXISTS (SELECT 1 FROM {source} e WHERE e.seq = b.seq)")
            chosen += f" WHERE o.key IS NULL OR ({tried} IS NULL"
            if self._on_postgresql:
                chosen += (
                    " AND NOT EXISTS (SELECT 1 FROM picked b WHERE b.key = o.key AND b.seq < o.seq"
                    " AND NOT EXISTS (SELECT 1 FROM locked e WHERE e.seq = b.seq))"
                )
            chosen += ")"
        among = f"= ANY(ARRAY({chosen}))" if self._on_postgresql else f"IN ({chosen})"
        return sa.text(
            f"UPDATE {table} SET lease = {words.uuid.format(':lease')}, attempts = attempts + 1,"
            f" lease_until = {now} + {words.seconds.format(':seconds')} WHERE seq {among}"
            f" RETURNING {_MESSAGE}, {words.json.format('headers')} AS headers,"
            f" {words.json.format('payload')} AS payload, created_at AS stored_at"
        )


class Locks:
    """
    The advisory locks of PostgreSQL for a pair of tables.

    A transaction that stores messages has a shared lock from before its first position until its end. Its second number
    is the last position before its own. So a claim knows which rows may still be preceded by one that it cannot see,
    and waits for no other transactions of the database.
    """

    def __init__(self, outbox: str, inbox: str) -> None:
        table, self._inbox = _number(outbox), _number(inbox)
        name = outbox.replace("'", "''").replace(":", "\\:")
        sequence = f"CAST(pg_get_serial_sequence('{name}', 'seq') AS regclass)"
        last = f"coalesce(pg_sequence_last_value({sequence}), 0)"
        #: A version of PostgreSQL may return no last position without these rights: no key would ever be settled.
        self.may_read_sequence = sa.text(f"SELECT has_sequence_privilege({sequence}, 'USAGE, SELECT')")
        #: Part of a statement that stores messages.
        self.storing = f"(SELECT pg_advisory_xact_lock_shared({table}, CAST({last} % {_MODULUS} AS int)) OFFSET 0)"

        held = (
            f"FROM pg_locks WHERE locktype = 'advisory' AND classid = CAST(CAST('{name}' AS regclass) AS oid)"
            " AND objsubid = 2 AND mode = 'ShareLock' AND granted"
            " AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
        )
        before = f"taken.last - (taken.last - CAST(objid AS bigint)) % {_MODULUS}"
        # The last position is read before the locks, as each part needs what the one before has returned.
        settled = (
            "WITH taken AS MATERIALIZED (SELECT {first}{last} AS last) SELECT least(taken.last, l.before)"
            " FROM taken, LATERAL (SELECT min({before}) AS before {held}) l"
        )
        # The table changes so fast that its statistics are always out of date: the planner must not choose by them. A
        # relay that is suspended in the middle of a claim, as a laptop is, does not keep the lock.
        settings = {**dict.fromkeys(_UNWANTED, "off"), "idle_in_transaction_session_timeout": _LONGEST_PAUSE}
        first = "".join(f"set_config('{name}', '{value}', true), " for name, value in settings.items())
        claiming = f"pg_advisory_xact_lock({_CLAIMS}, {table}), "
        #: Returns the last position that no open transaction can precede; *claim* also lets other claims wait.
        self.settled = sa.text(settled.format(first="", last=last, before=before, held=held))
        self.claim = sa.text(settled.format(first=f"{first}{claiming}", last=last, before=before, held=held))
        self.holder = sa.text(
            f"WITH taken AS MATERIALIZED (SELECT {last} AS last) SELECT l.pid,"
            " CAST(EXTRACT(EPOCH FROM clock_timestamp() - a.xact_start) AS double precision) AS open_for"
            f" FROM taken, LATERAL (SELECT pid, {before} AS before {held}) l LEFT JOIN pg_stat_activity a"
            " ON a.pid = l.pid ORDER BY l.before, a.xact_start LIMIT 1"
        )

        #: Rows that are finished bring those back that were parked behind them. Meanwhile none may be parked.
        self.park = sa.text(f"SELECT pg_advisory_xact_lock({_PARKING}, {table})")
        self.finish = sa.text(f"SELECT pg_advisory_xact_lock_shared({_PARKING}, {table})")
        self.prune = sa.text(f"SELECT pg_try_advisory_xact_lock({_PRUNING}, {self._inbox})")
        self.create = sa.text(f"SELECT pg_advisory_xact_lock({_CREATING}, 0)")


#: The first numbers of the locks.
_CLAIMS, _PARKING, _PRUNING, _CREATING = range(0x64696174, 0x64696178)
#: A position as the number of a lock.
_MODULUS = 2**31 - 1
#: The ways to read a table that a claim must not take.
_UNWANTED = ("enable_seqscan", "enable_bitmapscan", "enable_sort", "jit")
_LONGEST_PAUSE = "10s"


def _number(table: str) -> str:
    name = table.replace("'", "''").replace(":", "\\:")
    return f"CAST(CAST(CAST('{name}' AS regclass) AS oid) AS int)"
