"""Train another package's model on labels of one molecule, for a given processor time; repeat it to go on.

    python fit.py MODULE FOLDER

runs in that package's environment. MODULE is a file beside this one with

    build(options) -> model                 `options` has "size", "facts" and perhaps "state"
    graph(numbers, positions) -> graph      as the model takes one structure
    collate(graphs) -> batch                of several
    predict(model, batch) -> (energy (B,), forces (B·N, 3)), differentiable if the model is in training
    neighbors(graph) -> float               edges per atom

and FOLDER holds `job.json` ("size", "training" and "data", a file named from there) and gets `model.pt` and
`fitted.json`; see `examples/benchmarks/same_accuracy.py`.

The loop is the same for every package; model, graphs, batches, weights of the loss and settings of the optimiser are
its own. All of them document Adam (AMSGrad) on mean squared errors of the energy per atom and of the forces, with an
exponential moving average of the weights. Their plateau schedules need days: here the learning rate falls as a cosine
of the processor time that is spent, so that it has fallen whatever the budget is.
"""

import copy
import importlib.util
import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch

WARM_UP = 100  # steps
FINAL = 1e-3  # of the learning rate
PARTS = 10  # of the budget: validated and saved after each
VALIDATION_BATCH = 20


def load(path):
    """MODULE."""
    sys.path.append(str(Path(__file__).parents[1]))  # they import `worker`
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def facts_of(numbers, energies, forces, neighbors):
    """What the models are scaled with: E0 of least squares per element, eV; root mean square of the forces, eV/Å."""
    elements, counts = np.unique(numbers, return_counts=True)
    e0 = np.linalg.lstsq(np.tile(counts, (len(energies), 1)), energies, rcond=None)[0]
    return {
        "elements": elements.tolist(),
        "e0": e0.tolist(),
        "scale": float(np.sqrt(np.mean(forces**2))),
        "neighbors": float(neighbors),
    }


class Fit:
    """The training of one model."""

    def __init__(self, peer, folder):
        self.peer, self.folder = peer, folder
        self.job = json.loads((folder / "job.json").read_text())
        self.set = self.job["training"]
        torch.set_num_threads(1)
        torch.set_default_dtype(torch.float32)
        torch.manual_seed(self.set["seed"])
        with np.load(folder / self.job["data"]) as found:
            data = {name: found[name] for name in found}
        self.numbers = data["numbers"]
        self.parts = {}
        for part in ("train", "valid", "held_out"):
            positions, energies, forces = (data[f"{part}/{name}"] for name in ("positions", "energies", "forces"))
            self.parts[part] = (positions, energies, torch.tensor(forces, dtype=torch.float32))
        self.graphs, self.preparing = {}, 0.0
        neighbors = np.mean(
            [peer.neighbors(self.graph("train", k)) for k in range(min(100, len(self.parts["train"][1])))]
        )
        self.facts = facts_of(self.numbers, data["train/energies"], data["train/forces"], neighbors)
        self.model = peer.build({"size": self.job["size"], "facts": self.facts})
        self.averaged = copy.deepcopy(self.model.state_dict())
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        settings = {name: self.set[name] for name in ("weight_decay", "amsgrad")}
        self.optimizer = torch.optim.Adam(self.parameters, lr=self.set["learning_rate"], **settings)
        self.counters = {"seconds": 0.0, "steps": 0, "frames": 0, "best": math.inf, "log": []}
        self.best = None
        if self.state_path.is_file():
            state = torch.load(self.state_path, weights_only=True)
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.averaged, self.best, self.counters = state["averaged"], state["best"], state["counters"]

    @property
    def state_path(self):
        """What is needed to go on."""
        return self.folder / "state.pt"

    def graph(self, part, k):
        """Made once, when it is first asked for; the time that takes is no training."""
        if (part, k) not in self.graphs:
            begun = time.process_time()
            self.graphs[part, k] = self.peer.graph(self.numbers, self.parts[part][0][k])
            self.preparing += time.process_time() - begun
        return self.graphs[part, k]

    def run(self):
        """Train until the budget is spent, then judge the best weights on the held-out set."""
        budget = 60 * self.set["minutes"]
        before = self.counters["seconds"] - (time.process_time() - self.preparing)
        order, rng = [], np.random.default_rng([self.set["seed"], self.counters["steps"]])
        self.model.train()
        while self.counters["seconds"] < budget:
            if len(order) < self.set["batch_size"]:
                order = rng.permutation(len(self.parts["train"][1])).tolist()
            chosen = [order.pop() for _ in range(min(self.set["batch_size"], len(order)))]
            part = int(PARTS * self.counters["seconds"] / budget)
            self.step(chosen, self.counters["seconds"] / budget)
            self.counters["seconds"] = before + time.process_time() - self.preparing
            if int(PARTS * self.counters["seconds"] / budget) > part or self.counters["seconds"] >= budget:
                self.keep_if_best()
                self.counters["seconds"] = before + time.process_time() - self.preparing
                self.save()
        self.model.load_state_dict(self.best)
        found = {"size": self.job["size"], "facts": self.facts}
        torch.save({**found, "state": self.best}, self.folder / "model.pt")
        energy, force = self.errors("held_out")
        return {
            "parameters": sum(p.numel() for p in self.parameters),
            "labels": len(self.parts["train"][1]),
            "minutes": self.counters["seconds"] / 60,
            "steps": self.counters["steps"],
            "frames": self.counters["frames"],
            "energy_mae": energy,
            "force_mae": force,
            "log": self.counters["log"],
        }

    def step(self, chosen, spent):
        """One step of the optimiser; `spent` is the fraction of the budget."""
        _, energies, forces = self.parts["train"]
        fall = FINAL + (1 - FINAL) * 0.5 * (1 + math.cos(math.pi * min(spent, 1.0)))
        rise = min(1.0, (self.counters["steps"] + 1) / WARM_UP)
        for group in self.optimizer.param_groups:
            group["lr"] = self.set["learning_rate"] * fall * rise
        atoms = len(self.numbers)
        energy, force = self.peer.predict(self.model, self.peer.collate([self.graph("train", k) for k in chosen]))
        target = torch.tensor(energies[chosen], dtype=torch.float64)
        off = (energy.double() - target) / atoms
        loss = self.set["energy_weight"] * off.square().mean().float()
        loss = loss + self.set["forces_weight"] * (force - forces[chosen].flatten(0, 1)).square().mean()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if self.set["clip_norm"] is not None:
            torch.nn.utils.clip_grad_norm_(self.parameters, self.set["clip_norm"])
        self.optimizer.step()
        self.counters["steps"] += 1
        self.counters["frames"] += len(chosen)
        done = self.counters["steps"]
        decay = min(self.set["ema_decay"], (1 + done) / (10 + done))
        with torch.no_grad():
            for name, value in self.model.state_dict().items():
                kept = self.averaged[name]
                if kept.is_floating_point():
                    kept.lerp_(value, 1 - decay)

    def keep_if_best(self):
        """Validate the averaged weights."""
        current = copy.deepcopy(self.model.state_dict())
        self.model.load_state_dict(self.averaged)
        energy, force = self.errors("valid")
        if force < self.counters["best"]:
            self.counters["best"], self.best = force, copy.deepcopy(self.averaged)
        self.model.load_state_dict(current)
        minutes = self.counters["seconds"] / 60
        self.counters["log"].append({"minutes": minutes, "force_mae": force, "energy_mae": energy})
        print(f"{minutes:.1f} min, {self.counters['frames']} frames: force MAE {1e3 * force:.1f} meV/Å", flush=True)

    def errors(self, part):
        """Mean absolute errors: of the energy per atom, eV, and of the forces, eV/Å."""
        _, energies, forces = self.parts[part]
        self.model.eval()
        off = [[], []]
        for first in range(0, len(energies), VALIDATION_BATCH):
            some = range(first, min(first + VALIDATION_BATCH, len(energies)))
            batch = self.peer.collate([self.graph(part, k) for k in some])
            energy, force = self.peer.predict(self.model, batch)
            off[0].append(np.abs(energy.detach().double().numpy() - energies[some]) / len(self.numbers))
            off[1].append((force.detach() - forces[some].flatten(0, 1)).abs().numpy().ravel())
        self.model.train()
        return tuple(float(np.concatenate(values).mean()) for values in off)

    def save(self):
        """Replace the state on disk."""
        state = {name: getattr(self, name) for name in ("averaged", "best", "counters")}
        state |= {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        temporary = self.state_path.with_suffix(".new")
        torch.save(state, temporary)
        temporary.replace(self.state_path)


def main():
    """Fit, and say what came out."""
    module, folder = (Path(word) for word in sys.argv[1:])
    found = Fit(load(module), folder).run()
    temporary = folder / "fitted.new"
    temporary.write_text(json.dumps(found, indent=1))
    temporary.replace(folder / "fitted.json")


if __name__ == "__main__":
    main()
