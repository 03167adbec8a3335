"""Each file needs the library that its instrument writes to."""

from importlib.util import find_spec

_NEEDS = {"test_opentelemetry.py": ("opentelemetry", "sdk"), "test_prometheus.py": ("prometheus_client",)}

collect_ignore = [
    file
    for file, (package, *parts) in _NEEDS.items()
    if find_spec(package) is None or any(find_spec(f"{package}.{part}") is None for part in parts)
]
