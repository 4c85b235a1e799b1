"""The families that restow knows: text tables by kind, read by `restow.family.parse_family`. Tables only."""

from restow.catalog import fused, in_major, split

TABLES = (*split.TABLES, *fused.TABLES, *in_major.TABLES)
