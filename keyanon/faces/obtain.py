"""Where collections of faces are to be had, in words for messages. Python's own packages are enough to import this."""

CELEBAHQ = "CelebAMask-HQ.zip, linked from https://github.com/switchablenorms/CelebAMask-HQ (research only)."
FFHQ = "{version}, linked from https://github.com/NVlabs/ffhq-dataset."
LFW = (
    "lfw.tgz, pairs.txt, pairsDevTrain.txt and pairsDevTest.txt from https://vis-www.cs.umass.edu/lfw, in one "
    "folder; or the folder lfw_home that scikit-learn's fetch_lfw_pairs(funneled=False) leaves."
)
