"""Ray for one command: alone in its home, behind a token that only its owner reads."""

import fcntl
import os
import stat
from pathlib import Path

import pytest

from captioning import UserError
from services.farm.engine import LOCK_FILE, running_ray
from services.farm.settings import Home, Settings, open_home


def test_a_second_command_in_the_same_home_is_refused(tmp_path: Path):
    with (tmp_path / LOCK_FILE).open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with (
            pytest.raises(UserError, match="another lorafarm command"),
            running_ray(Home(tmp_path, Settings())),
        ):
            pass


@pytest.mark.slow
def test_the_local_token_is_readable_by_its_owner_only(ray_local: None):
    token = Path(os.environ["RAY_AUTH_TOKEN_PATH"])
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    assert os.environ["RAY_AUTH_MODE"] == "token"
    assert len(token.read_text()) >= 32


def test_settings_with_an_unknown_key_name_the_nearest_one(tmp_path: Path):
    (tmp_path / "settings.yaml").write_text("ray_adress: local")
    with pytest.raises(UserError, match="did you mean 'ray_address'"):
        open_home(tmp_path)


def test_opening_a_home_creates_nothing(tmp_path: Path):
    open_home(tmp_path / "new")
    assert not (tmp_path / "new").exists()
