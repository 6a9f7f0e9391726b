from vilt_tiny import one_thread  # noqa: F401
