"""The CUDA row pass of csrc/cuda. Arguments are addresses on the device; 0 where there is none."""

def row_pass(logits_dtype: int, logits: int, logits_stride: int, tokens: int, block_dtype: int, block: int,
             block_stride: int, rows: int, vocabulary: int, inverse_temperature: float, softcap: float, results: int,
             device: int, stream: int, smallest_cluster: int = 1) -> None: ...
def row_layout(dtype: int, vocabulary: int, second_sweep: bool, device: int, smallest_cluster: int = 1
               ) -> tuple[int, int, int]: ...
