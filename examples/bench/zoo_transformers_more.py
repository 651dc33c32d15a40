def others():
    return []
