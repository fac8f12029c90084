features: tuple[str, ...]
