"""The Atari games: their names, and scores of random play and of a human with their source.

Imports nothing but the standard library, so ``--help`` can list the games without loading the emulator.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from wn_rl.errors import UsageError, closest


@dataclass(frozen=True)
class Game:
    """A game that ale-py ships, with reference scores (raw points per game) where they are known.

    ``random_score`` and ``human_score`` are those used for human-normalized scores on Atari-57, from no-op starts
    and with episodes of at most 108,000 frames: Wang et al. 2016 (arXiv 1511.06581, appendix), as tabulated in
    google-deepmind/dqn_zoo, ``dqn_zoo/atari_data.py``. Mnih et al. 2015 list other human scores (Breakout 31.8).
    """

    name: str
    rom: str
    random_score: float | None = None
    human_score: float | None = None

    @property
    def gymnasium_id(self) -> str:
        """The game's Gymnasium id, e.g. ``ALE/Breakout-v5``."""
        return f"ALE/{self.name}-v5"

    @property
    def title(self) -> str:
        """The name with spaces between its words, e.g. ``Space Invaders``."""
        return re.sub(r"(?<=[a-z])(?=[A-Z0-9])", " ", self.name)

    def human_normalized(self, score: float) -> float | None:
        """Return ``score`` on the scale random play = 0, human = 1, or None where the two are not known."""
        if self.random_score is None or self.human_score is None:
            return None
        return (score - self.random_score) / (self.human_score - self.random_score)


# ale-py also ships Combat, Joust, Maze Craze and Warlords, which only its multi-player interface can start.
GAMES = (
    Game("Adventure", "adventure"),
    Game("AirRaid", "air_raid"),
    Game("Alien", "alien", 227.8, 7127.7),
    Game("Amidar", "amidar", 5.8, 1719.5),
    Game("Assault", "assault", 222.4, 742.0),
    Game("Asterix", "asterix", 210.0, 8503.3),
    Game("Asteroids", "asteroids", 719.1, 47388.7),
    Game("Atlantis", "atlantis", 12850.0, 29028.1),
    Game("Atlantis2", "atlantis2"),
    Game("Backgammon", "backgammon"),
    Game("BankHeist", "bank_heist", 14.2, 753.1),
    Game("BasicMath", "basic_math"),
    Game("BattleZone", "battle_zone", 2360.0, 37187.5),
    Game("BeamRider", "beam_rider", 363.9, 16926.5),
    Game("Berzerk", "berzerk", 123.7, 2630.4),
    Game("Blackjack", "blackjack"),
    Game("Bowling", "bowling", 23.1, 160.7),
    Game("Boxing", "boxing", 0.1, 12.1),
    Game("Breakout", "breakout", 1.7, 30.5),
    Game("Carnival", "carnival"),
    Game("Casino", "casino"),
    Game("Centipede", "centipede", 2090.9, 12017.0),
    Game("ChopperCommand", "chopper_command", 811.0, 7387.8),
    Game("CrazyClimber", "crazy_climber", 10780.5, 35829.4),
    Game("Crossbow", "crossbow"),
    Game("Darkchambers", "darkchambers"),
    Game("Defender", "defender", 2874.5, 18688.9),
    Game("DemonAttack", "demon_attack", 152.1, 1971.0),
    Game("DonkeyKong", "donkey_kong"),
    Game("DoubleDunk", "double_dunk", -18.6, -16.4),
    Game("Earthworld", "earthworld"),
    Game("ElevatorAction", "elevator_action"),
    Game("Enduro", "enduro", 0.0, 860.5),
    Game("Entombed", "entombed"),
    Game("Et", "et"),
    Game("FishingDerby", "fishing_derby", -91.7, -38.7),
    Game("FlagCapture", "flag_capture"),
    Game("Freeway", "freeway", 0.0, 29.6),
    Game("Frogger", "frogger"),
    Game("Frostbite", "frostbite", 65.2, 4334.7),
    Game("Galaxian", "galaxian"),
    Game("Gopher", "gopher", 257.6, 2412.5),
    Game("Gravitar", "gravitar", 173.0, 3351.4),
    Game("Hangman", "hangman"),
    Game("HauntedHouse", "haunted_house"),
    Game("Hero", "hero", 1027.0, 30826.4),
    Game("HumanCannonball", "human_cannonball"),
    Game("IceHockey", "ice_hockey", -11.2, 0.9),
    Game("Jamesbond", "jamesbond", 29.0, 302.8),
    Game("JourneyEscape", "journey_escape"),
    Game("Kaboom", "kaboom"),
    Game("Kangaroo", "kangaroo", 52.0, 3035.0),
    Game("KeystoneKapers", "keystone_kapers"),
    Game("KingKong", "king_kong"),
    Game("Klax", "klax"),
    Game("Koolaid", "koolaid"),
    Game("Krull", "krull", 1598.0, 2665.5),
    Game("KungFuMaster", "kung_fu_master", 258.5, 22736.3),
    Game("LaserGates", "laser_gates"),
    Game("LostLuggage", "lost_luggage"),
    Game("MarioBros", "mario_bros"),
    Game("MiniatureGolf", "miniature_golf"),
    Game("MontezumaRevenge", "montezuma_revenge", 0.0, 4753.3),
    Game("MrDo", "mr_do"),
    Game("MsPacman", "ms_pacman", 307.3, 6951.6),
    Game("NameThisGame", "name_this_game", 2292.3, 8049.0),
    Game("Othello", "othello"),
    Game("Pacman", "pacman"),
    Game("Phoenix", "phoenix", 761.4, 7242.6),
    Game("Pitfall", "pitfall", -229.4, 6463.7),
    Game("Pitfall2", "pitfall2"),
    Game("Pong", "pong", -20.7, 14.6),
    Game("Pooyan", "pooyan"),
    Game("PrivateEye", "private_eye", 24.9, 69571.3),
    Game("Qbert", "qbert", 163.9, 13455.0),
    Game("Riverraid", "riverraid", 1338.5, 17118.0),
    Game("RoadRunner", "road_runner", 11.5, 7845.0),
    Game("Robotank", "robotank", 2.2, 11.9),
    Game("Seaquest", "seaquest", 68.4, 42054.7),
    Game("SirLancelot", "sir_lancelot"),
    Game("Skiing", "skiing", -17098.1, -4336.9),
    Game("Solaris", "solaris", 1236.3, 12326.7),
    Game("SpaceInvaders", "space_invaders", 148.0, 1668.7),
    Game("SpaceWar", "space_war"),
    Game("StarGunner", "star_gunner", 664.0, 10250.0),
    Game("Superman", "superman"),
    Game("Surround", "surround", -10.0, 6.5),
    Game("Tennis", "tennis", -23.8, -8.3),
    Game("Tetris", "tetris"),
    Game("TicTacToe3D", "tic_tac_toe_3d"),
    Game("TimePilot", "time_pilot", 3568.0, 5229.2),
    Game("Trondead", "trondead"),
    Game("Turmoil", "turmoil"),
    Game("Tutankham", "tutankham", 11.4, 167.6),
    Game("UpNDown", "up_n_down", 533.4, 11693.2),
    Game("Venture", "venture", 0.0, 1187.5),
    Game("VideoCheckers", "video_checkers"),
    Game("VideoChess", "video_chess"),
    Game("VideoCube", "video_cube"),
    Game("VideoPinball", "video_pinball", 16256.9, 17667.9),
    Game("WizardOfWor", "wizard_of_wor", 563.5, 4756.5),
    Game("WordZapper", "word_zapper"),
    Game("YarsRevenge", "yars_revenge", 3092.9, 54576.9),
    Game("Zaxxon", "zaxxon", 32.5, 9173.3),
)

_BY_FOLDED = {game.name.lower(): game for game in GAMES}


def game_names() -> tuple[str, ...]:
    """Return the names of all games, e.g. ``SpaceInvaders``, in alphabetical order."""
    return tuple(game.name for game in GAMES)


def find_game(name: str) -> Game:
    """Return the game called ``name``: case, spaces, dashes, underscores and ``ALE/…-v5`` do not matter.

    Raises:
        UsageError: there is no such game; the message holds the nearest names.
    """
    bare = re.sub(r"^ale/|(noframeskip|deterministic)?-v\d+$", "", name.strip().lower())
    game = _BY_FOLDED.get(re.sub(r"[^a-z0-9]", "", bare))
    if game is None:
        raise UsageError(f"unknown game '{name}'.{closest(bare, game_names())} --help lists all {len(GAMES)}.")
    return game
