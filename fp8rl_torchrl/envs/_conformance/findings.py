"""What each check is called, what it asks for, and what was found so far."""

from __future__ import annotations

CHECKS = {
    "specs": "the specs agree with the environment's batch size and device, and accept their own samples",
    "no_crash": "reset and step never raise, however long the rollout",
    "keys": "reset and step give exactly the keys of the specs, at every step",
    "shape": "every entry has the shape of its spec",
    "dtype": "every entry has the dtype of its spec",
    "device": "every entry lives on the device of its spec",
    "bounds": "every value lies inside its spec, at every step",
    "finite": "no value is NaN or infinite, also under an unbounded spec",
    "detached": "no entry carries an autograd graph",
    "done_flags": "done is true exactly where terminated or truncated is",
    "reset_clears_done": "no done flag is true after a reset",
    "fresh_episode": "nothing of a finished episode is left over in the next one",
    "reset_seed": "the same seed gives the same sequence of starts",
    "seeds_differ": "different seeds give different episodes",
    "repeatable": "the same seed and actions give the same run",
    "aliasing": "a later step or reset never changes an entry that was returned earlier",
    "input_unchanged": "step only adds 'next' to the TensorDict it is given",
    "action_unchanged": "step does not write into the action",
    "action_accepted": "every action inside the spec is accepted, its extremes included",
    "reset_mask_only": "_reset works from a TensorDict that holds nothing but the reset mask",
    "partial_reset_isolated": "a partial reset leaves the other environments alone",
    "partial_reset_applied": "a partial reset restarts every environment that the mask names",
    "stateless": "a step is a function of its TensorDict alone, as `stateless = True` declares",
    "instances": "two instances share no state",
}
"""The name of every check, in the order of the report, and the property that it asserts."""

ADVICE = {
    "specs": "make every spec start with env.batch_size and live on env.device",
    "no_crash": "run the same seed and actions under a debugger up to that step",
    "keys": "return the same keys from every reset and every step, and declare each in a spec",
    "shape": "reshape the entry, or correct the shape of its spec (it includes env.batch_size)",
    "dtype": "cast the entry where it is made, or correct the dtype of its spec",
    "device": "create the entry on env.device",
    "bounds": "clamp the value, end the episode earlier, or widen the spec",
    "finite": "find the division, root or overflow that makes it; learning on it destroys the weights",
    "detached": "compute the entry from detached tensors or under torch.no_grad()",
    "done_flags": "set done = terminated | truncated",
    "reset_clears_done": "return False for every done flag of an environment that was reset",
    "fresh_episode": "set everything that an episode changes back to its start in _reset",
    "reset_seed": "draw the start from a generator that _set_seed seeds, and count episodes from set_seed on",
    "seeds_differ": "use the seed that _set_seed is given",
    "repeatable": "draw all randomness from a generator that _set_seed seeds, and set back in _reset what steps change",
    "aliasing": "return new tensors (or clones), and do not write into tensors already returned",
    "input_unchanged": "compute the next state out of place and return it in a new TensorDict",
    "action_unchanged": "clone the action before changing it",
    "action_accepted": "accept it, or narrow the action spec",
    "reset_mask_only": "do not rely on any entry but '_reset' in the TensorDict that _reset is given",
    "partial_reset_isolated": "change only the rows where '_reset' is true, in everything the environment keeps",
    "partial_reset_applied": "restart all the rows where '_reset' is true, in everything the environment keeps",
    "stateless": "carry all state in the TensorDict, or do not declare stateless = True",
    "instances": "keep state on the instance, not on the class or the module",
}
"""What to do when a check fails."""


class Findings:
    """Collects failures and outcomes by check, so that one failure never hides another."""

    def __init__(self) -> None:
        self._messages: dict[str, dict[object, str]] = {name: {} for name in CHECKS}
        self._reached: set[str] = set()
        self._not_reached: dict[str, str] = {}

    def reach(self, *checks: str) -> None:
        """Note that these checks were carried out."""
        self._reached.update(checks)

    def fail(self, check: str, message: str, topic: object = None) -> None:
        """Note a failure; of several about one topic (by default: the message) only the first is kept."""
        self.reach(check)
        self._messages[check].setdefault(message if topic is None else topic, message)

    def withdraw(self, check: str, topic: object) -> None:
        """Take back a failure that turned out to have another cause."""
        self._messages[check].pop(topic, None)

    def skip(self, check: str, reason: str) -> None:
        """Note why a check could not be carried out; it counts only while the check is not reached."""
        self._not_reached.setdefault(check, reason)

    def messages(self, check: str) -> tuple[str, ...]:
        """What failed in this check."""
        return tuple(self._messages[check].values())

    def failed(self, *checks: str) -> bool:
        """Whether any of these checks failed."""
        return any(self._messages[check] for check in checks)

    @property
    def count(self) -> int:
        """How many failures there are."""
        return sum(map(len, self._messages.values()))

    def reason(self, check: str) -> str | None:
        """Why the check was not reached, or None where it was."""
        if check in self._reached:
            return None
        return self._not_reached.get(check, "the failures of other checks came before it")
