"""The words that may stand beside a number (`numbers`), in the languages that people ask models in most."""

import re


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


QUALIFIERS = _words(
    "a an the about around roughly approximately approx approximate circa ca almost nearly some just only exactly "
    "precisely probably likely perhaps maybe still simply now then therefore thus so hence also usd eur gbp chf jpy cad "
    "aud rs euro etwa ungefähr rund genau environ unos aproximadamente un une ein eine it i he she they we you this that "
    "there who which my our its his her their your"
)
"""Before a number: they leave open what stands before them."""
LEADS = _words(
    "is are was were be been am being equals equal would will could should might can must hay ho gibt has have had get "
    "gets got gives give given make makes cost costs pay pays paid earn earns earned need needs weigh weighs spend spends "
    "spent say says said guess think believe estimate estimated predict predicts predicted guesses estimates opinion view "
    "answer answered choose pick rate rated assign i'd i'll i'm it's he's she's that's there's value result total sum "
    "score rating prediction risk chance probability likelihood confidence average mean median price amount income age "
    "share percentage output response yes sure okay ok ist sind war beträgt antwort es sei est c'est était réponse son è "
    "sono risposta respuesta resposta é antwoord lautet"
)
"""Before a number: they lead to it."""
NOUNS = _words(
    "chance probability likelihood risk value result total sum score rating estimate answer average mean median price "
    "cost income age rate share percentage prediction confidence amount guess number output response wahrscheinlichkeit "
    "wert"
)
PAIRS = {
    "of": NOUNS,
    "de": _words("alrededor"),
    "a": _words("y"),  # il y a 5
    "at": NOUNS | _words("it estimated stands put"),
    "as": NOUNS | _words("it estimated"),
    "to": _words("equal equals equates amounts comes close rounds corresponds adds"),
    "with": _words("go going"),
    "for": _words("go going"),
    "most": _words("is are was be it's"),  # most likely 5
}
"""Before a number: they lead to it behind one of the words that are given."""
TO_BE = _words("to going case true")
"""Before what leads to a number: "is not going to be 5"."""
COUNTED = _words(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety hundred thousand million billion dozen half "
    "quarter third twice double couple few"
)
MONTHS = _words(
    "january february march april may june july august september october november december jan feb mar apr jun jul aug "
    "sep sept oct nov dec januar februar märz mai juni juli oktober dezember janvier février mars avril juin juillet août "
    "septembre octobre novembre décembre enero febrero marzo abril mayo junio julio agosto septiembre octubre noviembre "
    "diciembre gennaio febbraio aprile maggio giugno luglio settembre ottobre dicembre maj maio mei"
)
NEGATIONS = _words(
    "not no never nor neither cannot doubt doubtful unlikely hardly except instead rather wrong false nicht kein keine "
    "nie pas jamais non ni não nunca niet geen"
)
BOUNDS = _words(
    "than less fewer least most max maximum maximal maximally min minimum minimal minimally limit bound under over above "
    "below beyond exceed exceeds exceeding up between from until till plus minus mindestens höchstens mehr weniger als "
    "unter über moins más menos meno più"
)
UNITS = _words(
    "year yr yrs month week day hour h hr hrs minute second s ms dollar cent euro pound franc usd eur gbp chf jpy cad aud "
    "kg g mg km cm mm l ml mile metre meter foot feet inch gram litre liter degree celsius fahrenheit person people "
    "children men women point unit item piece us old left each long tall high wide away total altogether jahr jahre "
    "jahren tag tage tagen woche wochen monat monate stunde stunden minuten sekunden punkt punkte personen menschen grad "
    "ans anni años mph kmh kw kwh months lengths widths depths births deaths paths mouths baths seconds miles squares"
)
"""Behind a number: what is counted. Plural nouns (`is_plural`) are, too."""
_MULTIPLES = _words(
    "fois veces vezes bis bps basis cubes thirds quarters halves halfs lakhs crores myriads hundreds thousands tens "
    "scores dozens times centaines dizaines douzaines docenas decenas cientos centos milliers mils gross percents moins "
    "plus minus versus less unless always perhaps this thus does tops sometimes dans sans sous mois mars"
)
_PLURAL = re.compile(r"(?!.*(?:th|ward)s\Z|.*ill(?:i?on|iard))[a-z]{2,}[a-rtv-z]s")


def is_plural(word: str) -> bool:
    """Return whether a word looks like a plural noun but not a multiple (dozens), part (eighths) or direction (upwards)."""
    return _PLURAL.fullmatch(word) is not None and word not in _MULTIPLES


OF_SHARES = _words("chance chances probability likelihood likely sure certain confident confidence risk odds")
"""Behind a share."""
GOES_ON = _words(
    "is are was were would seems because since as so but given based on that which while although though considering due "
    "assuming here overall if when for ist"
)
"""Behind a number: how a sentence goes on."""
STATES = _words("is are was were would seems as")
OBJECTIONS = _words("too incorrect impossible lowest highest smallest largest")
"""Behind those of `STATES`: "5 is too high"."""
TO_WHOM = _words("this him her them it")
IN_WHAT = _words("total all this my our your that fact general short conclusion")
OF_WHOM = _words("the all them people cases women men respondents")
_CHANGES = _words(
    "max maximum min minimum tops plus minus more less fewer times at up upwards % percent percentage x × squared cubed "
    "out or hundreds thousands millions billions dozens wrong nope factorial"
)
CHANGES_BEHIND = _CHANGES | COUNTED | MONTHS
"""They change a number even behind a mark: "5, at most"."""
