"""Options of how words are picked and how long they are remembered, the same for every verb that speaks.

See `casa.streaming.Sampling` and `casa.streaming.StreamingSession`.
"""

from typing import Annotated

import typer

MaxNewTokens = Annotated[int, typer.Option(help="Tokens of the longest caption.")]
Temperature = Annotated[float, typer.Option(help="0 is greedy; above, words are drawn.")]
TopK = Annotated[int, typer.Option(help="Draw from the k likeliest tokens; 0: all.")]
TopP = Annotated[float, typer.Option(help="Draw from the likeliest tokens of this probability in all.")]
Repetition = Annotated[float, typer.Option(help="Taken from a token's score for each time it was said; 0: nothing.")]
Decay = Annotated[float, typer.Option(help="How much of a saying counts one token later, for --repetition.")]
NoRepeat = Annotated[int, typer.Option(help="No run of so many tokens is said twice; 0: allowed.")]
StopBias = Annotated[float, typer.Option(help="Added to the stop token's score; above 0 says less.")]
Seed = Annotated[int, typer.Option(help="Of the draws.")]
MaxTextTokens = Annotated[int, typer.Option(min=0, help="Bound on the text remembered, in tokens; 0: none.")]
