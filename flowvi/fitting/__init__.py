"""A fit: what is decided between trainings, its result, its folder."""
