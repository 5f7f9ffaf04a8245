"""SimCLR on scikit-learn's digits, from images to a linear probe: ``python examples/simclr.py``"""

import argparse
from pathlib import Path

import torch

import fastproj as fp

SIDE = 16  # pixels


def main(folder: Path, epochs: int) -> float:
    """Pre-train for ``epochs`` with betons in ``folder``; the linear probe's top-1 on val."""
    torch.manual_seed(0)
    train, val = (fp.write_beton(source, folder) for source in fp.open_sources("digits"))

    # Two random crops per image, then the augmentation. Digits have neither colors nor a mirror.
    loader = fp.open_loader(train, [fp.Crop(SIDE, num_views=2, scale=(0.3, 1.0))], batch_size=128)
    view = fp.View(flip_prob=0, saturation=0, hue=0, gray_prob=0, blur_prob=0)
    augmentation = fp.Augmentation([view, view], train.manifest.mean, train.manifest.std)

    encoder = fp.build_encoder("resnet_small", stem="cifar")
    projector = fp.build_projector("mlp", encoder.num_features, hidden=512, out=128)
    objective = fp.build_objective("simclr", projector.out_features, temperature=0.2)
    learner = fp.Learner(encoder, projector, objective, classes=len(train.classes))
    optimizer = torch.optim.AdamW(learner.parameters(), lr=1e-3)
    trainer = fp.Trainer(
        learner, loader, optimizer, [augmentation], epochs=epochs, warmup_epochs=epochs / 8
    )
    for epoch in range(epochs):
        for batch in trainer.epoch():
            metrics = trainer.train_step(batch)
        print(f"epoch {epoch + 1}: loss {metrics['loss']:.3f}")

    def embed(beton: fp.Beton) -> fp.Features:
        whole = fp.open_loader(beton, [fp.Center(SIDE)], 256, shuffle=False, drop_last=False)
        return fp.features(encoder, whole, mean=train.manifest.mean, std=train.manifest.std)

    result = fp.linear_probe(embed(train), embed(val))
    print(f"linear probe: {result.metrics['top1']:.2%} of {len(val)} digits")
    return result.metrics["top1"]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("data/digits"))
    parser.add_argument("--epochs", type=int, default=40)
    given = parser.parse_args()
    main(given.folder, given.epochs)
