"""Output transforms on modules: order, removal, copies, collection."""

import copy
import gc
import pickle
import weakref

import torch
from torch import nn

from actmaps.maps.hooks import attach


def append(letter):
    return lambda _module, output: output + letter


class Empty(nn.Module):
    def forward(self):
        return ""


def test_transforms_run_in_the_order_in_which_they_were_attached():
    module = Empty()
    for letter in "abc":
        attach(module, append(letter))
    assert module() == "abc"
    assert len(module._forward_hooks) == 1


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


def test_the_last_removal_takes_the_hook_away():
    module = Empty()
    detach = attach(module, append("a"))
    detach()
    detach()
    assert not module._forward_hooks
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

    def once(_module, output):
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
    assert not other._forward_hooks
    assert not module._forward_hooks


def test_a_pickled_module_is_plain():
    module = nn.Linear(2, 2)
    attach(module, lambda _module, output: output + 1)
    other = pickle.loads(pickle.dumps(module))
    assert torch.equal(other(torch.ones(1, 2)) + 1, module(torch.ones(1, 2)))


def test_a_hooked_module_that_goes_out_of_use_is_collected():
    module = Empty()
    attach(module, lambda _module, output, own=module: output)  # the transform refers back to its module
    gone = weakref.ref(module)
    del module
    gc.collect()
    assert gone() is None
