"""The families that restow knows: text tables by kind, read by `restow.family.parse_family`. Tables only."""

from restow.catalog import (
    fused,
    fused_more,
    in_major,
    inkling,
    split,
    split_bias,
    split_odd_bias,
    split_plain,
    split_w,
    two_banks,
    ungated,
)

TABLES = (
    *split.TABLES,
    *split_plain.TABLES,
    *split_w.TABLES,
    *split_bias.TABLES,
    *split_odd_bias.TABLES,
    *two_banks.TABLES,
    *fused.TABLES,
    *fused_more.TABLES,
    *inkling.TABLES,
    *in_major.TABLES,
    *ungated.TABLES,
)
