"""
What tests need: of a transport that somebody wrote, and of a program that uses one. Needs the extra `testing`.

`diator.testing.conformance` proves that a transport keeps the contract of `diator.brokers.base`, and
`diator.testing.saboteurs` that this proof is worth something.
"""
