"""One file a baseline, or a family of them, with the same two parts.

May import: `declaration`, `dual_space`, `pairing`, `pieces` and `ops` of the losses, data, models; schemas.
Lost without it: that baseline.
"""
