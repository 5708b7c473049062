"""Market1501 with the additional distractors published by its authors."""

from readers.market1501 import FOLDERS, PARTS, PUBLISHED, TRAINING, Market
from readers.place import find

DISTRACTORS = 'images'


class Market1501With500k(Market):
    """Market1501 with more than 500,000 images of other persons and of false detections added to the gallery.

    Zheng et al., Scalable Person Re-identification: A Benchmark, ICCV 2015. Training set, queries and location are
    those of `-d market1501`. The archive distractors_500k.zip from the authors' page, unzipped beside
    bounding_box_test, creates a folder `images`, according to the documentation of torchreid, which reads its names
    like those of bounding_box_test. They are read in the same way here: person 0 is a distractor, -1 is junk.

    No available source gives the exact number of distractors, so it is not checked.
    """

    def __init__(self, data_dir: str = 'data') -> None:
        parts = PARTS | {DISTRACTORS: 'from distractors_500k.zip'}
        root, untrainable = find(data_dir, 'market1501_500k', FOLDERS, parts, TRAINING)
        self.published = {subset: known for subset, known in PUBLISHED.items() if subset != 'gallery'}
        super().__init__(
            root,
            'market1501_500k',
            title='Market1501 + 500k',
            untrainable=untrainable,
            whole=True,
            distractors=(DISTRACTORS,),
        )
