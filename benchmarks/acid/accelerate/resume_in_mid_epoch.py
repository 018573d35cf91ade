"""`save_state`, `load_state`, and `skip_first_batches` for the rest of the epoch that was stopped."""
from accelerate import Accelerator
from works import Work


def train(work: Work, model, tape):
    accelerator = Accelerator(cpu=True)
    optimizer = work.make_optimizer(model.parameters())
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, work.train_loader(),
                                                              work.make_schedule(optimizer))
    done = 0
    if work.part == 2:
        accelerator.load_state(work.folder / "state")
        done = work.stop_after
    for _ in range(done // len(loader), work.epochs):
        skip = done % len(loader)
        for input, target in accelerator.skip_first_batches(loader, skip) if skip else loader:
            accelerator.backward(work.loss(model(input), target))
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            done += 1
            if work.part == 1 and done == work.stop_after:
                accelerator.save_state(work.folder / "state")
                return
