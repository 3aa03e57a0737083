"""SlipstreamPromptBatch: a list of prompts to batches of CONDITIONING."""

from typing import Any

from comfy_api.latest import io

from ..backends import host
from ..backends.prompts import lines as prompt_lines
from ..backends.prompts.encode import encode, tell


class SlipstreamPromptBatch(io.ComfyNode):
    """All outputs are lists, of batches or of pictures: ComfyUI runs what follows for each."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SlipstreamPromptBatch",
            display_name="Slipstream Prompt Batch",
            category="model/conditioning/slipstream",
            description=(
                "Output-preserving. Samples a list of prompts in batches, a picture for each: "
                "every row of a batch has its own prompt. On several GPUs, Sequence Parallel "
                "shares the rows. Prompts that cannot share a batch exactly get another one."
            ),
            search_aliases=[
                "prompts from file", "prompt list", "batch prompts", "load prompts", "text file",
                "multiple prompts", "different prompts",
            ],
            hidden=[io.Hidden.unique_id],
            inputs=[
                io.Clip.Input("clip", tooltip="The text encoder of the model that samples."),
                io.String.Input(
                    "text", multiline=True, dynamic_prompts=True,
                    placeholder="one prompt a line, # starts a comment",
                    tooltip=(
                        "One prompt a line. Empty lines and lines that start with # are left out; "
                        "write \\# for a prompt that starts with #."
                    ),
                ),
                io.Combo.Input(
                    "file",
                    options=[prompt_lines.NO_FILE, *prompt_lines.file_names(host.input_folder())],
                    default=prompt_lines.NO_FILE, optional=True,
                    tooltip=(
                        "A .txt file in ComfyUI's input folder, UTF-8. Its prompts come first, "
                        "those of text behind them."
                    ),
                ),
                io.Int.Input(
                    "prompts_per_batch", default=4, min=1, max=1024, optional=True,
                    tooltip=(
                        "Prompts that are sampled at once, at most. Memory of sampling grows with "
                        "it. For several GPUs: a multiple of their number."
                    ),
                ),
                io.String.Input(
                    "separator", default="", optional=True, advanced=True,
                    tooltip=(
                        "Empty: every line is a prompt. Else, for example ---: prompts have "
                        "several lines and end at a line that holds only this."
                    ),
                ),
                io.Int.Input(
                    "first", default=1, min=1, max=10**6, optional=True, advanced=True,
                    tooltip="Number of the first prompt to sample; the first of the list is 1.",
                ),
                io.Int.Input(
                    "max_prompts", default=0, min=0, max=prompt_lines.MAX_PROMPTS, optional=True,
                    advanced=True,
                    tooltip=(
                        f"How many to sample, from first on. 0: all, up to "
                        f"{prompt_lines.MAX_PROMPTS}."
                    ),
                ),
            ],
            outputs=[
                io.Conditioning.Output(
                    "conditioning", is_output_list=True,
                    tooltip="The positive prompt of a sampler, once per batch.",
                ),
                io.Int.Output(
                    "count", is_output_list=True,
                    tooltip="Prompts of each batch: wire it to batch_size of an empty latent.",
                ),
                io.String.Output(
                    "prompts", is_output_list=True,
                    tooltip="The prompt of each picture, in the order of the pictures.",
                ),
                io.String.Output(
                    "names", is_output_list=True,
                    tooltip=(
                        "A file name for each picture, such as 007_a_red_fox: the prompt's number "
                        "and its first words. For filename_prefix, behind Rebatch Images."
                    ),
                ),
            ],
        )  # fmt: skip

    @classmethod
    def fingerprint_inputs(cls, file: str | None = None, **_: Any) -> str:
        return prompt_lines.fingerprint(host.input_folder(), file)

    @classmethod
    def validate_inputs(cls, file: str | None = None) -> bool | str:
        if file and file != prompt_lines.NO_FILE:
            try:
                prompt_lines.find(host.input_folder(), file)
            except prompt_lines.PromptsError as error:
                return str(error)
        return True

    @classmethod
    def execute(
        cls,
        clip: Any,
        text: str,
        file: str = prompt_lines.NO_FILE,
        prompts_per_batch: int = 4,
        separator: str = "",
        first: int = 1,
        max_prompts: int = 0,
    ) -> io.NodeOutput:
        written = prompt_lines.from_file(host.input_folder(), file, separator)
        written += prompt_lines.split(text, separator)
        chosen = prompt_lines.choose(written, first, max_prompts)
        batches, padding = encode(clip, chosen, prompts_per_batch)
        tell(batches, padding, prompts_per_batch, cls.hidden.unique_id)
        pictured = [line for batch in batches for line in batch.lines]
        return io.NodeOutput(
            [batch.conditioning for batch in batches],
            [len(batch.lines) for batch in batches],
            [line.text for line in pictured],
            [prompt_lines.picture_name(line) for line in pictured],
        )
