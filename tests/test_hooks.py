"""Output transforms on modules: order, removal, copies, collection."""

import copy
import gc
import pickle
import weakref

import torch
from torch import nn

from actmaps.maps.hooks import attach, before_call


def append(letter):
    return lambda output: output + letter


class Empty(nn.Module):
    def forward(self):
        return ""


def test_transforms_run_in_the_order_in_which_they_were_attached():
    module = Empty()
    for letter in "abc":
        attach(module, append(letter))
    assert module() == "abc"


def test_removal_in_any_order_leaves_the_others_and_at_last_no_hook():
    module = Empty()
    detach = {letter: attach(module, append(letter)) for letter in "abc"}
    detach["b"]()
    assert module() == "ac"
    detach["a"]()
    detach["a"]()
    assert module() == "c"
    attach(module, append("d"))
    detach["c"]()
    assert module() == "d"


def test_the_last_removal_restores_the_module():
    module = Empty()
    detach = attach(module, append("a"))
    detach()
    detach()
    assert "forward" not in vars(module)
    attach(module, append("b"))
    assert module() == "b"


def test_hooks_that_were_there_before_see_the_transformed_output_and_stay():
    module, seen = Empty(), []
    module.register_forward_hook(lambda *args: seen.append(args[2]))
    detach = attach(module, append("a"))
    module()
    detach()
    module()
    assert seen == ["a", ""]


def test_a_transform_may_detach_itself_during_the_forward():
    module, detach = Empty(), []

    def once(output):
        detach[0]()
        return output + "once"

    detach.append(attach(module, once))
    attach(module, append("always"))
    assert [module(), module()] == ["oncealways", "always"]


def test_a_deep_copy_is_plain_and_can_be_hooked_itself():
    module = Empty()
    detach = attach(module, append("a"))
    other = copy.deepcopy(module)
    assert (module(), other()) == ("a", "")
    remove = attach(other, append("b"))
    assert (module(), other()) == ("a", "b")
    remove()
    detach()
    assert "forward" not in vars(other)
    assert "forward" not in vars(module)


def test_a_pickled_module_is_plain():
    module = nn.Linear(2, 2)
    attach(module, lambda output: output + 1)
    other = pickle.loads(pickle.dumps(module))
    assert torch.equal(other(torch.ones(1, 2)) + 1, module(torch.ones(1, 2)))


def test_a_hooked_module_that_goes_out_of_use_is_collected():
    module = Empty()
    attach(module, lambda output, own=module: output)  # the transform refers back to its module
    gone = weakref.ref(module)
    del module
    gc.collect()
    assert gone() is None


# Beside others who replace a module's forward, as accelerate's hooks and ComfyUI's object patches do


def wrapped(module, letter):
    """Somebody else's forward around the present one; returns what undoes it."""
    before = module.forward
    module.forward = lambda: before() + letter
    return lambda: setattr(module, "forward", before)


def test_a_forward_that_was_there_before_is_kept_and_comes_back():
    module = Empty()
    wrapped(module, "o")
    own = module.forward
    detach = attach(module, append("a"))
    assert module() == "oa"
    detach()
    assert module.forward is own


def test_a_forward_that_came_later_stays_and_only_the_transforms_go():
    module = Empty()
    detach = attach(module, append("a"))
    undo = wrapped(module, "o")
    assert module() == "ao"
    detach_outer = attach(module, append("b"))
    assert module() == "aob"
    detach()
    detach_outer()
    assert module() == "o"
    undo()
    assert module() == ""


def test_transforms_that_others_dropped_can_be_attached_again():
    module = Empty()
    undo = wrapped(module, "o")
    plain = module.forward
    detach = attach(module, append("a"))
    module.forward = plain
    detach()
    assert module() == "o"
    detach = attach(module, append("b"))
    assert module() == "ob"
    detach()
    undo()


def test_a_deep_copy_of_a_module_with_a_forward_of_its_own_keeps_that():
    module = Empty()
    module.forward = append("o").__get__("")  # a bound method without a module
    detach = attach(module, append("a"))
    assert copy.deepcopy(module)() == "o"
    detach()


# Before a call


def test_callbacks_see_the_arguments_of_each_call_until_they_are_taken_off():
    module, seen = nn.Linear(2, 2), []
    first = before_call(module, lambda args, kwargs: seen.append((len(args), list(kwargs))))
    second = before_call(module, lambda *_: seen.append("second"))
    x = torch.ones(1, 2)
    module(x)
    first()
    first()
    module(input=x)
    second()
    module(x)
    assert seen == [(1, []), "second", "second"]


def test_callbacks_of_a_compiled_module_can_be_taken_off_in_any_order():
    module, seen = nn.Linear(2, 2), []
    module.compile(backend="eager")
    compiled = module._compiled_call_impl
    remove = [before_call(module, lambda *_, letter=letter: seen.append(letter)) for letter in "ab"]
    module(torch.ones(1, 2))
    remove[0]()
    module(torch.ones(1, 2))
    remove[1]()
    module(torch.ones(1, 2))
    assert sorted(seen) == ["a", "b", "b"]
    assert module._compiled_call_impl is compiled
