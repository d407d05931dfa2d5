"""What of a file is mapped into this process."""


def mapped_ranges(path):
    """Where a file is mapped in this process."""
    with open("/proc/self/maps") as maps:
        places = [line.split()[0] for line in maps if line.rstrip("\n").endswith(str(path))]
    return [tuple(int(part, 16) for part in place.split("-")) for place in places]


def lies_in(tensor, ranges):
    storage = tensor.untyped_storage()
    begin, end = storage.data_ptr(), storage.data_ptr() + storage.nbytes()
    return any(first <= begin and end <= last for first, last in ranges)
