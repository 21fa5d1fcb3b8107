"""Words that fill the task templates: capitalised nouns and first names.

Chosen by hand and kept where GPT-2's BPE has the word as one token both at the start of a text and after a
space. Other tokenizers know fewer; `subcircuit.analysis.tasks` picks those that are one token for the tokenizer
at hand.
"""

from __future__ import annotations

NOUNS: tuple[str, ...] = tuple(
    """
    Ring Van Box Card Key Lock Wall Room House Home Town City Park Road Street Bridge River Lake Sea Ocean
    Sand Stone Rock Hill Forest Tree Field Farm Dog Cat Bird Fish Bear Wolf Fox Snake Dragon Mouse Bull
    Cow Sun Moon Star Sky Cloud Rain Snow Wind Storm Fire Water Ice Light Shadow Night Day Morning Train
    Car Bus Ship Wheel Engine Machine Computer Phone Radio Camera Screen Video Book Page Letter Paper Pen
    Story Song Music Film Game Ball Team Club School College Class Student Doctor King Queen Prince Lord
    Lady Knight Captain Driver Police Judge Guard Master Father Mother Brother Baby Child Girl Boy Man
    Woman Friend Guest Heart Head Hand Foot Face Eye Bone Skin Hat Glass Table Chair Bed Clock Watch
    Window Gate Church Bank Shop Store Market Office Factory Mine Gold Silver Iron Steel Wood Oil Gas Salt
    Meat Apple Orange Tea Beer Sword Shield Bow Flag Map Coin Mail Note List Photo Image Picture Frame
    Color Square Line Point Cross Block Wire Chain Net Root Diamond Magic Dream Angel Hero Spirit Voice
    Sound Bell Board Desk Lab Hall Court Army Camp Base Port Planet Earth World Space Rocket Station Code
    File Disk Drive Chip Battery Motor Tank Pool Corn Chicken Tool
    """.split()
)
"""Capitalised nouns, for the templates `done in` and `lost in`."""

FIRST_NAMES: tuple[str, ...] = tuple(
    """
    James John Robert Michael William David Richard Charles Joseph Thomas Christopher Daniel Paul Mark
    Donald George Steven Edward Brian Anthony Kevin Jason Matthew Gary Jose Larry Frank Scott Eric Stephen
    Andrew Joshua Jerry Patrick Peter Henry Carl Arthur Ryan Roger Joe Jack Albert Jonathan Justin Terry
    Keith Roy Bruce Brandon Adam Harry Fred Billy Steve Louis Jeremy Aaron Howard Russell Martin Todd
    Craig Alan Sean Chris Johnny Jimmy Danny Tony Mike Allen Jeff Jacob Lee Kyle Ray Alexander Mario
    Marcus Jay Jim Tom Alex Jon Bill Leon Warren Tim Gordon Dean Greg Dan Lewis Sam Rick Charlie Tyler
    Gene Mary Elizabeth Jennifer Maria Susan Lisa Michelle Laura Sarah Jessica Amy Anna Virginia Marie Ann
    Alice Jean Rose Kelly Jane Rachel Anne Ruby Emily Robin Crystal Victoria Kim Eva Jamie Kate Max Ben
    Nick Matt Luke Simon Neil Ian Karl Ali Ted Bob Ron Rob Ken Phil Andy Josh Jake Hunter Austin Connor
    Cole Blake
    """.split()
)
"""English first names, for the template `born in`."""
