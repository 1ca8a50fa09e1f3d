"""As much of vLLM as registration touches, written as a package for other processes to import."""

from pathlib import Path
from textwrap import dedent

FILES = {
    "__init__.py": "",
    "config.py": """
        from contextlib import contextmanager
        from types import SimpleNamespace

        current = None

        def get_current_vllm_config():
            assert current is not None
            return current

        def get_current_vllm_config_or_none():
            return current

        @contextmanager
        def using(backend=None, **model):
            global current
            model = SimpleNamespace(hf_text_config=SimpleNamespace(**model))
            attention = SimpleNamespace(backend=backend)
            current = SimpleNamespace(attention_config=attention, model_config=model)
            yield
            current = None
        """,
    "platforms.py": """
        from types import SimpleNamespace

        current_platform = SimpleNamespace(is_cpu=lambda: True, fp8_dtype=None)
        """,
    "model_executor/__init__.py": "",
    "model_executor/models/__init__.py": "",
    "model_executor/models/registry.py": """
        class ModelRegistry:
            models = {}
            register_model = classmethod(lambda cls, name, path: cls.models.update({name: path}))
            get_supported_archs = classmethod(
                lambda cls: ["GptOssForCausalLM", "LlamaForCausalLM", *cls.models]
            )
        """,
    "model_executor/models/config.py": """
        from dataclasses import dataclass

        @dataclass(frozen=True)
        class ArchConfig:
            total_num_attention_heads: int

        class VerifyAndUpdateConfig:
            @staticmethod
            def verify_and_update_config(vllm_config): ...

        class GptOssConfig(VerifyAndUpdateConfig):
            @staticmethod
            def verify_and_update_config(vllm_config):
                vllm_config.changed_by = "vllm"

        MODELS_CONFIG_MAP = {"GptOssForCausalLM": GptOssConfig}
        """,
    "v1/__init__.py": "",
    "v1/kv_cache_interface.py": "class AttentionSpec: ...",
    "v1/attention/__init__.py": "",
    "v1/attention/backend.py": """
        from enum import Enum
        from typing import Generic, TypeVar

        T = TypeVar("T")

        class AttentionBackend: ...
        class AttentionImpl(Generic[T]): ...
        class AttentionMetadataBuilder(Generic[T]): ...
        class CommonAttentionMetadata: ...
        class AttentionType: DECODER = "decoder"
        AttentionCGSupport = Enum("AttentionCGSupport", ["UNIFORM_SINGLE_TOKEN_DECODE"])
        """,
    "v1/attention/backends/__init__.py": "",
    "v1/attention/backends/cpu_attn.py": "class CPUAttentionBackend: pass",
    "v1/attention/backends/registry.py": """
        from enum import Enum
        from importlib import import_module

        overrides = {}

        class AttentionBackendEnum(Enum):
            FLASH_ATTN = "vllm.v1.attention.backends.flash_attn.FlashAttentionBackend"
            CPU_ATTN = "vllm.v1.attention.backends.cpu_attn.CPUAttentionBackend"

            @classmethod
            def register(cls, name, path):
                member = object.__new__(cls)
                member._name_, member._value_ = name, path
                cls._member_map_[name] = cls._value2member_map_[path] = member
                return member

            def get_class(self):
                module, name = overrides.get(self, self.value).rsplit(".", 1)
                return getattr(import_module(module), name)

        def register_backend(backend, path):
            if isinstance(backend, str):
                backend = AttentionBackendEnum.register(backend, path)
            overrides[backend] = path
        """,
}


def write(folder: Path) -> Path:
    """Write the package ``vllm`` into a folder, which goes into ``sys.path``."""
    for name, text in FILES.items():
        file = folder / "vllm" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(dedent(text))
    return folder
