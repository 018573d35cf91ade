"""Segmentation: which pixels of a noisy picture are a square, which a disc? Measured by intersection over union."""
from functools import partial

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import JaccardIndex

from loopctl import fit


def shapes(number, size, generator):
    """Pictures of a disc and a square in noise (N, 1, size, size), and the class of each pixel (N, size, size)."""
    rows, columns = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    centres = torch.randint(size, (4, number, 1, 1), generator=generator)
    square = ((rows - centres[0]).abs() < size // 5) & ((columns - centres[1]).abs() < size // 5)
    disc = (rows - centres[2]) ** 2 + (columns - centres[3]) ** 2 < (size // 5) ** 2
    classes = torch.where(disc, 2, square.long())           # 0 background, 1 square, 2 disc, which covers the square
    noise = torch.randn(number, size, size, generator=generator)
    return (classes * 0.5 + 0.3 * noise).unsqueeze(1), classes


def data(size: int = 32):
    """300 pictures to train on and 100 to validate on, the same ones each time."""
    generator = torch.Generator().manual_seed(0)
    return [TensorDataset(*shapes(number, size, generator)) for number in (300, 100)]


class Model(nn.Module):
    """A U-Net of two levels: the second sees more of the picture, the first keeps the edges sharp."""

    def __init__(self, width: int = 8):
        super().__init__()
        self.fine, self.coarse = block(1, width), block(width, 2 * width)
        self.down, self.up = nn.MaxPool2d(4), nn.Upsample(scale_factor=4)
        self.joined = nn.Sequential(block(3 * width, width), nn.Conv2d(width, 3, 1))

    def forward(self, pictures):
        fine = self.fine(pictures)
        return self.joined(torch.cat([fine, self.up(self.coarse(self.down(fine)))], 1))


def block(channels, filters):
    return nn.Sequential(nn.Conv2d(channels, filters, 3, padding=1, bias=False), nn.BatchNorm2d(filters), nn.ReLU())


def main():
    torch.manual_seed(0)
    train, valid = data()
    return fit(
        Model(), nn.CrossEntropyLoss(), partial(torch.optim.AdamW, lr=0.01), DataLoader(train, 32, shuffle=True),
        DataLoader(valid, 32), epochs=5, metrics={"iou": JaccardIndex("multiclass", num_classes=3)},
        plugins=["onecycle:max_lr=0.02"], seed=0)


if __name__ == "__main__":
    print(main().history[-1])
