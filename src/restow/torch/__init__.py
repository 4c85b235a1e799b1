"""Everything that needs torch. `restow` itself imports none of this until a verb is called."""
