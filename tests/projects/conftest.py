"""Projects are tried without what they fetch: the fonts that matplotlib carries, the common words."""

import pytest

from projects.casa_smol import fonts, words


@pytest.fixture(autouse=True, scope="session")
def nothing_fetched(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CASA_SMOL_CACHE", str(tmp_path_factory.mktemp("cache")))
        for kept in (fonts.kins, words.word_list):
            kept.cache_clear()
        yield
    for kept in (fonts.kins, words.word_list):
        kept.cache_clear()
