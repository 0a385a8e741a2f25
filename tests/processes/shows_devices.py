"""A plugin for pytest that prints which GPUs the session could see at its end."""

import os


def pytest_sessionfinish() -> None:
    print("devices", os.environ.get("CUDA_VISIBLE_DEVICES"))
