"""Stand-in for Slicer's module `SampleData`: writes down what is registered."""


class SampleDataLogic:
    """The data sets that Slicer offers to load."""

    categories, sources = [], []

    @classmethod
    def registerCustomSampleDataCategory(cls, **described):
        cls.categories.append(described)

    @classmethod
    def registerCustomSampleDataSource(cls, **described):
        cls.sources.append(described)
