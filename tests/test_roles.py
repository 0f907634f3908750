"""The rows of model families agree with themselves and with gguf's own tensor names."""

import gguf
import pytest

from bitladder.formats.roles import FAMILIES, family_of, layer_tensor

NAMES = [pytest.param(name, id=name) for name in FAMILIES]


def roles_of(name: str) -> list[str]:
    return [role for parameter in FAMILIES[name].parameters for role in parameter.roles]


@pytest.mark.parametrize("name", NAMES)
def test_each_role_makes_one_parameter(name: str):
    roles = roles_of(name)
    paths = [parameter.path for parameter in FAMILIES[name].parameters]
    assert len(roles) == len(set(roles))
    assert len(paths) == len(set(paths))


@pytest.mark.parametrize("name", NAMES)
def test_each_linear_layer_reads_one_shared_input(name: str):
    family = FAMILIES[name]
    read = [role for shared in family.inputs for role in shared.roles]
    linear = {
        role
        for parameter in family.parameters
        for role in parameter.roles
        if role.endswith(".weight") and "norm" not in role
    }
    assert len(read) == len(set(read))
    assert set(read) == linear


@pytest.mark.parametrize("name", NAMES)
def test_modules_and_absorbing_tensors_exist(name: str):
    family = FAMILIES[name]
    paths = [parameter.path for parameter in family.parameters]
    for shared in family.inputs:
        assert any(path.startswith(shared.module + ".") for path in paths)
        assert shared.absorbs is None or shared.absorbs in roles_of(name)


@pytest.mark.parametrize("name", NAMES)
def test_roles_are_gguf_names(name: str):
    architecture = name.removesuffix("+experts")
    arch = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == architecture)
    known = {gguf.TENSOR_NAMES[tensor].format(bid=0) for tensor in gguf.MODEL_TENSORS[arch]}
    for role in roles_of(name):
        assert layer_tensor(0, role).rsplit(".", 1)[0] in known


def test_mixtral_is_llama_with_experts():
    assert family_of("llama", 0) is FAMILIES["llama"]
    assert family_of("llama", 8) is FAMILIES["llama+experts"]
    assert family_of("mamba") is None
