"""Where collections of faces are to be had, in words for messages. Python's own packages are enough to import this."""

CELEBAHQ = "CelebAMask-HQ.zip, linked from https://github.com/switchablenorms/CelebAMask-HQ (research only)."
FFHQ = "{version}, linked from https://github.com/NVlabs/ffhq-dataset."
LFW = (
    "deep-funneled, as the authors have it, from https://www.kaggle.com/datasets/jessicali9530/lfw-dataset; or lfw.tgz, "
    "lfw-funneled.tgz or lfw-deepfunneled.tgz with pairsDevTrain.txt, pairsDevTest.txt and pairs.txt beside, from "
    "https://vis-www.cs.umass.edu/lfw; or the folder lfw_home that scikit-learn's fetch_lfw_pairs leaves (research only)."
)
