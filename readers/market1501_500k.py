"""Market1501 with the distractors that its authors published beside it."""

from readers.market1501 import FOLDERS, PARTS, PUBLISHED, TRAINING, Market
from readers.place import find

DISTRACTORS = 'images'


class Market1501With500k(Market):
    """Market1501, whose gallery also holds more than 500,000 images of other persons and of false detections.

    Zheng et al., Scalable Person Re-identification: A Benchmark, ICCV 2015. Training set and queries are those of `-d
    market1501`, and so is the place. The archive distractors_500k.zip of the authors' page is unzipped beside
    bounding_box_test and gives a folder `images`: so the documentation of torchreid, which also reads its names as
    those of bounding_box_test. Here they are read in the same way: person 0 is a distractor, -1 is junk.

    The exact number of distractors is in no source at hand, and is therefore not checked.
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
