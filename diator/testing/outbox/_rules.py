"""Which rule of the contract each scenario proves. The rules are quoted from the docstrings that specify them."""

from __future__ import annotations

from typing import Any

from diator.outbox.store import Claim, DeadRow, Row, Status, Store
from diator.testing._suite.rules import Contract

_GUIDE = "docs/writing-a-store.md"
_PLACES: dict[str, tuple[Any, str]] = {
    "Store": (Store, f"{_GUIDE}#what-to-promise"),
    "add": (Store.add, f"{_GUIDE}#in-the-transaction-of-the-program"),
    "cancel": (Store.cancel, f"{_GUIDE}#in-the-transaction-of-the-program"),
    "first_time": (Store.first_time, f"{_GUIDE}#in-the-transaction-of-the-program"),
    "check": (Store.check, f"{_GUIDE}#for-the-relay"),
    "claim": (Store.claim, f"{_GUIDE}#for-the-relay"),
    "Claim": (Claim, f"{_GUIDE}#for-the-relay"),
    "Row": (Row, f"{_GUIDE}#for-the-relay"),
    "finish": (Store.finish, f"{_GUIDE}#for-the-relay"),
    "wait": (Store.wait, f"{_GUIDE}#for-the-relay"),
    "close": (Store.close, f"{_GUIDE}#for-the-relay"),
    "Status": (Status, f"{_GUIDE}#for-people"),
    "dead": (Store.dead, f"{_GUIDE}#for-people"),
    "DeadRow": (DeadRow, f"{_GUIDE}#for-people"),
    "redrive": (Store.redrive, f"{_GUIDE}#for-people"),
    "discard": (Store.discard, f"{_GUIDE}#for-people"),
    "prune": (Store.prune, f"{_GUIDE}#for-people"),
}
"""Where the contract stands: the object with the docstring, and the section of the guide that explains it."""

RULES: dict[str, str] = {
    "Store: `add`, `cancel` and `first_time` work": "STO-TXN-02 STO-USE-03",
    "Store: A row exists if and only if": (
        "STO-PRC-01 STO-PRC-02 STO-TXN-01 STO-TXN-03 STO-TXN-04 STO-TXN-07 STO-TXN-08 "
        "STO-DAT-01 STO-DAT-02 STO-DAT-03 STO-DAT-04 STO-DAT-06 STO-DAT-08 STO-DAT-09"
    ),
    "Store: Of several relays, each row": (
        "STO-CLM-01 STO-CLM-03 STO-CLM-04 STO-CLM-05 STO-CLM-06 STO-CLM-14 STO-PRC-03"
    ),
    "Store: With the order `key`": (
        "STO-KEY-01 STO-KEY-02 STO-KEY-03 STO-KEY-04 STO-KEY-05 STO-KEY-06 STO-KEY-07 STO-KEY-08 STO-KEY-09 STO-KEY-10 "
        "STO-KEY-11 STO-LNG-01 STO-LNG-02 STO-LNG-03 STO-LNG-05 STO-DUE-04"
    ),
    "Store: What is not due costs nothing": "STO-USE-05 STO-USE-06",
    "Store: Any error of the database": "STO-STA-07 STO-USE-04",
    "Store: It can be made without": "STO-USE-01 STO-USE-02",
    "add: Store *messages*": "STO-TXN-06",
    "add: *due* says": "STO-DUE-01 STO-DUE-02 STO-DUE-03",
    "add: Return a function": "STO-TXN-05",
    "add: EncodingError:": "STO-DAT-05",
    "cancel": "STO-DUE-05 STO-DUE-07 STO-DUE-08 STO-DUE-09",
    "cancel: Return whether": "STO-DUE-06",
    "first_time": "STO-INB-01 STO-INB-02 STO-INB-03",
    "first_time: While another": "STO-INB-04 STO-INB-05 STO-INB-06 STO-PRC-04",
    "check: ConfigurationError:": "STO-STA-06",
    "check": "STO-STA-05",
    "claim: Lease at most": "STO-CLM-02",
    "Claim: lease:": "STO-CLM-11",
    "Claim: rows:": "",
    "Claim: next_due:": "STO-CLM-13",
    "Row: message:": "STO-DAT-07",
    "Row: stored_at:": "STO-CLM-12",
    "finish": "STO-CLM-08",
    "finish: A row that is released": "STO-CLM-07 STO-CLM-09 STO-CLM-10",
    "wait: Wait until": "STO-WKE-01 STO-WKE-02 STO-WKE-03 STO-WKE-07 STO-WKE-09 STO-PRC-05",
    "wait: The database may not tell": "STO-WKE-04 STO-WKE-05 STO-WKE-08",
    "close": "STO-WKE-06",
    "Status": "STO-STA-01",
    "Status: pending:": "STO-STA-02",
    "Status: oldest:": "STO-STA-04",
    "Status: leased:": "STO-STA-03",
    "Status: held_back:": "STO-LNG-04",
    "Status: held_back_by:": "STO-LNG-06",
    "DeadRow": "STO-DED-01 STO-DED-03",
    "dead": "STO-DED-02 STO-DED-08",
    "redrive": "STO-DED-04 STO-DED-05",
    "discard": "STO-DED-06 STO-DED-07",
    "prune": "STO-INB-07 STO-INB-08",
    "prune: Of several": "STO-INB-09",
}
"""The rules, each by its place and its first words (without them: the first paragraph), with their scenarios."""

CONTRACT = Contract(_PLACES, RULES)
