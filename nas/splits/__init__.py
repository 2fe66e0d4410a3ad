"""Several supernets in place of one: few-shot splits, exhaustive or by gradient matching, and the tree of runs they make."""
