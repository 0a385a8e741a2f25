"""Train, evaluate and predict in ten lines. `photos` is a folder with one subfolder of images per class."""

import keyhole

run = keyhole.train("photos", "runs/one", patch={"size": 32}, select={"m": 8}, train={"epochs": 30})
print(keyhole.evaluate(run))

prediction = keyhole.load(run).predict("photos/red/1.png")
print(prediction.label, prediction.probability)
print(prediction.kept.boxes, prediction.kept.attention["label"])  # level-0 x, y, width, height; weights
print(prediction.scores.map())  # a score for every patch, on its grid
