"""Weight formats, one file each: pack, unpack, and the operator that reads it."""
