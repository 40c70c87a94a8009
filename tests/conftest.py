"""What holds for every test: hypothesis draws the same examples each time and has no clock to fail by."""

from hypothesis import settings

settings.register_profile("tandem", deadline=None, derandomize=True)
settings.load_profile("tandem")
