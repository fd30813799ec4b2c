"""Who reads whom, and how a model learns it: one rule a file, all of them by name in ``rules.RULES``."""
