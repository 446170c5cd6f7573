"""Words for prompts: how people ask for camera motions, and what else stands in their sentences.

Data only, for ``prompts``. In verb and noun phrases ``{d}`` is the direction, ``{o}`` its opposite, ``{n}`` something
in the picture, ``{r}`` a sense of rotation. What is listed twice is drawn twice as often.
"""

from __future__ import annotations


def words_of(text: str) -> tuple[str, ...]:
    """The items of a text, separated by bars."""
    return tuple(item.strip() for item in text.replace("\n", " ").split("|"))


# Verb phrases by what follows the verb; "{d}" is the direction and "{o}" its opposite.
SIDE_VERBS = words_of("pan|pan|pan|turn|move|move|track|truck|slide|sweep|swing|glide|drift|shift|dolly|crab|travel")
SIDE_ENDS = words_of(
    "{d}|{d}|{d}|to the {d}|to the {d}|over to the {d}|{d}ward|{d}wards|toward the {d}|towards the {d}|from {o} to {d}"
)
LEVEL_VERBS = words_of("tilt|tilt|tilt|pan|move|pedestal|crane|boom|look|sweep|drift|glide|swing")
LEVEL_ENDS = words_of("{d}|{d}|{d}ward|{d}wards")
ROLL_VERBS = words_of("roll|rotate|rotate|turn|spin|twist")
ROLL_ENDS = {
    "clockwise": words_of("clockwise|clockwise|in a clockwise direction"),
    "counterclockwise": words_of("counterclockwise|counter-clockwise|counter clockwise|anticlockwise|anti-clockwise"),
}
VERBS: dict[str, tuple[str, ...]] = {
    "up": words_of("rise|rise|rise up|rise above the {n}|ascend|lift up|climb up|move higher"),
    "down": words_of("descend|lower|sink down|drop down|come down|move lower"),
    "in": words_of(
        """zoom in|zoom in|zoom in|zoom in|zoom into the {n}|zoom in on the {n}|push in|push in|push in on the {n}
        |push forward|dolly in|dolly in|dolly forward|dolly into the {n}|move in|move closer|move closer to the {n}
        |move forward|move forwards|move toward the {n}|move towards the {n}|come closer|get closer to the {n}
        |track in|track forward|close in on the {n}|creep in|creep closer|travel forward|approach the {n}
        |glide forward|fly forward|go forward|advance"""
    ),
    "out": words_of(
        """zoom out|zoom out|zoom out|zoom out|zoom out from the {n}|zoom out to reveal the {n}|pull out|pull back
        |pull back|pull back from the {n}|pull back to reveal the {n}|pull away|pull away from the {n}|dolly out
        |dolly out|dolly back|dolly backward|dolly away from the {n}|move back|move backward|move backwards|move out
        |move away|move away from the {n}|back away|back away from the {n}|track back|track out|track backward
        |retreat|withdraw|drift back|glide backward|glide backwards|fly backward|go backward"""
    ),
    "shake": words_of("shake|shake|tremble|wobble|jitter|shake like a handheld one"),
}
NOUNS: dict[str, tuple[str, ...]] = {
    "side": words_of(
        """pan {d}|pan {d}|pan to the {d}|{d} pan|{d}ward pan|tracking shot to the {d}|tracking shot {d}|truck {d}
        |camera move to the {d}|camera movement to the {d}|panning shot to the {d}|slide to the {d}|dolly {d}
        |pan from {o} to {d}|{o}-to-{d} pan|camera pan {d}|{d}ward tracking shot|lateral move to the {d}
        |camera turn {d}"""
    ),
    "level": words_of(
        """tilt {d}|tilt {d}|{d}ward tilt|{d}ward pan|pedestal {d}|crane {d}|crane shot {d}|vertical pan {d}|pan {d}
        |{d}ward camera movement|tilting shot {d}|camera tilt {d}|tilt-{d} shot|boom {d}|{d}ward crane shot"""
    ),
    "in": words_of(
        """zoom in|zoom in|zoom-in|push in|push-in|push-in shot|dolly in|dolly-in|dolly in shot|zoom in on the {n}
        |forward dolly|forward tracking shot|dolly forward|zoom-in shot|camera movement forward|camera zoom in
        |forward camera move|push in on the {n}|zoom into the {n}|zoom toward the {n}|inward zoom"""
    ),
    "out": words_of(
        """zoom out|zoom out|zoom-out|pull back|pull-back|pull-back shot|pull out|dolly out|dolly-out|dolly out shot
        |zoom out from the {n}|backward dolly|backward tracking shot|dolly backward|zoom-out shot
        |pull back from the {n}|camera movement backward|camera zoom out|backward camera move|zoom away from the {n}
        |outward zoom"""
    ),
    "roll": words_of("{r} roll|{r} rotation|{r} camera roll|roll {r}|camera roll {r}|rotation {r}|{r} spin|{r} turn"),
    "shake": words_of(
        """handheld shake|handheld camera|hand-held camera|shaky camera|camera shake|handheld|handheld shot|shaky cam
        |handheld footage|handheld look|shaky footage|shaky handheld camera|unsteady camera|wobbly camera
        |jittery camera|handheld camera shake|hand-held shot|handheld style|handheld feel"""
    ),
}
STATIC = words_of(
    """static shot|static shot|static camera|camera static|still camera|locked-off shot|the camera does not move
    |no motion|no camera movement|no camera motion|the camera stays still|the camera remains still|fixed camera
    |the camera is fixed|the camera holds still|locked camera|stationary camera|the camera stays fixed|camera still
    |the camera is static|static|static frame|fixed shot|without camera movement|without any camera motion
    |tripod shot|no camera moves|the camera doesn't move|the camera remains static|motionless camera
    |do not move the camera|the shot is static|locked-off camera|camera is still|camera fixed|stationary shot
    |keep the camera still|no zoom|no camera movement please|no camera motion please|please keep the camera fixed
    |camera locked off|the camera is locked|camera does not move|the camera never moves|without moving the camera
    |only the scene moves, the camera is fixed|still camera, only the subject moves|the frame stays fixed
    |static camera, no zoom|fixed camera angle|fixed camera position|hold the camera still"""
)
ADVERBS = {
    "slow": words_of("slowly|slowly|slowly|gently|gently|gradually|very slowly|softly|subtly|slightly|at a slow pace"),
    "": words_of("smoothly|steadily|evenly"),
    "fast": words_of("quickly|quickly|fast|fast|rapidly|swiftly|very fast|very quickly|at high speed|suddenly"),
}
ADJECTIVES = {
    "slow": words_of("slow|slow|slow|gentle|gradual|subtle|very slow|slight|leisurely"),
    "": words_of("smooth|steady|cinematic"),
    "fast": words_of("fast|fast|quick|rapid|swift|very fast|sudden|high-speed"),
}

QUALITIES = words_of(
    """misty|golden|quiet|old|wooden|green|rocky|snowy|wild|bright|dark|colorful|tiny|huge|red|blue|empty|ancient
    |sunny|rainy|foggy|lonely|modern|rusty|purple|white|stormy|warm|cold|soft|black|yellow|orange|pink|silver|crowded
    |narrow|wide|tall|small|big|large|beautiful|serene|majestic|calm|busy|abandoned|cozy|elegant|fluffy|shiny|glowing
    |frozen|dusty|lush|vast|steep|vintage|futuristic|medieval|tropical|autumn|winter|spring|summer|happy|sad|young
    |elderly|curious|sleepy|playful|hungry|brave|tired|smiling|upright|broken|open|round|curly|striped|spotted
    |left-handed|outdoor|indoor|straight|brightly lit|well-lit|upside-down|slow|fast|moving|rolling|inviting
    |outstanding|downtown|upscale"""
)
PLACES = words_of(
    """lake|mountain|forest|street|bridge|castle|river|valley|beach|desert|city|harbor|field|garden|waterfall|cliff
    |sky|temple|tower|road|island|glacier|ocean|canyon|market|meadow|dune|lighthouse|village|town|kitchen|bedroom
    |library|church|cathedral|factory|station|airport|park|playground|stadium|museum|gallery|cafe|restaurant|bar
    |office|hallway|staircase|rooftop|courtyard|vineyard|farm|barn|pond|swamp|jungle|cave|volcano|coast|bay|lagoon
    |reef|skyline|alley|highway|tunnel|pier|hill|plain|orchard|greenhouse|workshop|theater|palace|ruins|shrine
    |fountain|square|subway|countryside|snowfield|fjord|savanna|wheat field|rice terraces|ski slope|swimming pool
    |living room|train station"""
)
THINGS = words_of(
    """flower|boat|tree|leaf|house|train|window|cloud|moon|car|bicycle|motorcycle|bus|truck|tractor|airplane
    |helicopter|balloon|kite|ship|canoe|sailboat|lamp|candle|book|clock|piano|guitar|violin|chair|table|sofa|bench
    |cup of coffee|bowl of soup|plate of pancakes|slice of pizza|birthday cake|apple|orange|loaf of bread
    |bottle of wine|glass of water|vase|statue|painting|door|mirror|umbrella|hat|shoe|suitcase|laptop|phone
    |camera on a shelf|robot|drone|rocket|planet|galaxy|star|snowman|campfire|firework|rainbow|rose|sunflower|cactus
    |mushroom|pumpkin|shell|crystal|diamond|ring|coin|teapot|frying pan|panda toy|doll|puppet|carousel|ferris wheel
    |windmill|crane|pickup truck|steam engine|zoo gate|portrait|still life|panorama|landscape|tilted tower
    |row of houses|line of parked cars|bubbles|smoke|paint"""
)
BEINGS = words_of(
    """cat|dog|bird|woman|man|child|girl|boy|couple|family|dancer|chef|farmer|soldier|astronaut|painter|musician
    |teacher|old man|old woman|young woman|baby|bride|cyclist|surfer|skier|runner|fisherman|photographer|tourist|monk
    |king|queen|knight|wizard|horse|cow|sheep|goat|pig|chicken|duck|goose|swan|owl|eagle|parrot|penguin|fox|wolf|bear
    |deer|rabbit|squirrel|mouse|elephant|lion|tiger|giraffe|zebra|monkey|panda|kangaroo|koala|whale|dolphin|shark
    |fish|turtle|octopus|jellyfish|lobster|butterfly|bee|spider|snail|frog|snake|dragon|unicorn|puppy|kitten
    |truck driver|group of people|crowd"""
)
DOING = words_of(
    """sleeping|sitting|standing|reading a book|drinking tea|eating an apple|playing the guitar|dancing|singing
    |smiling|laughing|walking|running|jumping|swimming|cooking dinner|looking at the sea|staring at the sky
    |waving a hand|working|writing a letter|painting a wall|holding a cup|wearing a red coat|wearing a hat
    |riding a horse|riding a bicycle|driving a car|fishing|talking on the phone|playing chess|blowing bubbles
    |carrying a basket|watching the sunset|typing on a laptop|chopping onions|stirring a pan|doing push-ups
    |pushing a cart|pulling a rope|pulling a sled|rolling dough|turning a page|zipping up a jacket|throwing a ball
    |lifting weights|tilting its head|shaking hands|looking up at the stars|looking down at the floor
    |looking to the left|turning right|lying down|standing upright|sitting upright|waking up|getting up|growing up
    |cleaning up|falling down|walking in the rain|looking out of a window|stretching out an arm
    |coming out of the water|running away|moving slowly|running fast|walking quickly|going home|leaning back
    |flying back to the nest|left alone|left behind|with its left paw raised|on the right|on the left side"""
)
NATURE = words_of(
    """steam|smoke|mist|fog|rain|snow|dust|sand|sparks|embers|foam|bubbles|water|lava|clay|honey|milk|paint|light
    |the tide|the surf|waves|ripples|clouds|leaves|petals|feathers|snowflakes|raindrops|fireflies|confetti|lanterns
    |balloons|hot air balloons|flags|curtains|hair|ribbons|clock hands|wheels|gears|fan blades|windmill sails
    |headlights|trams|taxis|ferries|soldiers|dancers|pilgrims|shoppers|swallows|geese|ants|horses|fish|the sun
    |the moon|the sea|the river|the train|the elevator|the swing|the door|the curtain|the drawbridge|the pendulum"""
)
HAPPENING = words_of(
    """rise|rise up|climb|float|drift|drift off|fall|fall down|tumble|sink|drop|pour|spill|roll|roll over|spin
    |spin around|turn|turn around|rotate|swirl|whirl|swing|sway|shake|tremble|rock|flicker|flutter|wave|move|move off
    |rush|race
    |gallop|march|walk|run|fly|fly off|dart|dart off|glide|slide|creep|crawl|jump|leap|dive|hover|circle|pull back
    |pull away|push through|come closer|go by|pass by|sail|row|drive|drive off|back up|slow down|speed up|lean|lean in
    |look|look up|look down|look back|point|reach|stretch|open|close|bloom|melt|burn|glow|breathe|blink|nod|bow"""
)
WHITHER = words_of(
    """||||left|right|to the left|to the right|off to the left|off to the right|up|down|upward|downward|up and away|away
    |back|forward|in|out|closer|round and round|in circles|clockwise|counterclockwise|from left to right
    |from right to left|back and forth|from side to side|up and down|higher|lower|toward us|towards the viewer"""
)
PASSING = words_of(
    "past|over|across|behind|around|along|through|above|below|towards|into|out of|at|from|up|down|against|onto"
)
GOING = words_of(
    """flies|walks|runs|swims|floats|drifts|turns|moves|looks|rolls|climbs|slides|drives|sails|jumps|points|glides
    |steps|flies slowly|walks slowly|runs quickly|swims quickly|is flying|is walking|is moving|is turning|flying
    |walking|moving|turning|drifting|looking|running|crawls|leans|hops|dives|spins|rises|marches|tilts its head
    |turns its head|shakes"""
)
WHERE = words_of(
    """left|right|to the left|to the right|up|down|upwards|downwards|in|out|away|back|forward|forwards|backwards
    |around|closer|in circles|out of the frame|into the distance|from left to right|from right to left|up the hill
    |down the road|over the right bank|clockwise|toward the right|in and out|up and down|left and right
    |off to the left"""
)
ABOUT = words_of(
    """a bright morning|the right bank of the river|the sun sets over the town|the sun comes out|smoke rises up
    |leaves fall down|snow falls down|rain pours down|the sun goes down|clouds move to the left|waves roll in
    |waves roll back|the tide goes out|lights turn on|the lights go out|steam rises upward|a door on the right
    |on the left a red house|to the right a tree|a street lit up at night|a path leading up|stairs going down
    |stairs leading up|an upright piano|a left turn sign|nothing left|two cookies left on a plate|copyright 2024
    |bright right side|a close-up|close up|extreme close-up|a panorama|upstairs|downstairs|inside|outside|downtown
    |shot on film|shot from below|shot from above|seen from the left|viewed from the right|an overhead view
    |bird's eye view|a fast river|a slow river|slow motion|in slow motion|a quick snack|fast food|rolling hills
    |a still lake|people move|dust drifts in the light|the water is still|the wind shakes the leaves|a milkshake
    |the flag waves|hair blowing|the wheel rotates|gears rotate clockwise|the clock hands turn clockwise
    |a spinning top|the planet spins slowly|a crane lifts a box up|a truck turns right|a truck drives away
    |tracks in the snow|a push-button phone|traffic moves fast|cars move quickly|the train moves forward
    |the crowd moves closer|bubbles float upwards|petals fall gently|a zoom lens|a camera on a tripod
    |a man with a camera|a photographer holding a camera|a left-hand glove|in the upper right corner
    |in the lower left corner|the elevator goes up|the boat drifts away|the kite goes up|the ball rolls down the hill"""
)
TIMES = words_of(
    """at dawn|at night|at sunset|at sunrise|at noon|in the morning|in the evening|in winter|in summer|in the fall
    |in spring|in the rain|in the snow|in the fog|under a full moon|under the stars|by candlelight|on a sunny day
    |on a rainy day|during a storm|at dusk|in bright light|at golden hour|in moonlight|after the rain|at midnight
    |in the early morning"""
)
STYLES = words_of(
    """cinematic|cinematic lighting|4k|8k|highly detailed|photorealistic|realistic|oil painting|watercolor
    |anime style|black and white|soft focus|shallow depth of field|bokeh|vivid colors|moody|dramatic lighting
    |film grain|masterpiece|best quality|ultra hd|vintage film|pixel art|studio lighting|wide angle|macro|aerial view
    |35mm|hyperrealistic|hdr|pastel colors|sharp focus|natural light|documentary style|3d render|drone view
    |peaceful mood|epic|timelapse"""
)
JOINTS = words_of(
    "near|by|under|behind|next to|in front of|with|beside|above|below|across from|between|on top of|inside"
)
LETTERS = ("bcdfghklmnprstvwz", "aeiou")

# What links two motions, where a motion leads, what stands before it and before a subject.
NOUN_LINKS = words_of("and|,|,|with|followed by|combined with|then|plus")
VERB_LINKS = words_of("and|and|,|and then|, then|then|while")
SIDE_WAYS = words_of("over|across|along|past|around|through")
LEVEL_WAYS = {
    "up": words_of("to the sky|from the ground|toward the sky|along the {n}|towards the {n}"),
    "down": words_of("to the ground|from the sky|along the {n}|towards the {n}"),
}
STARTS = {
    "bare": words_of("|||||please|we|we|let us|camera:|camera motion:|camera movement:|camera|then"),
    "third": words_of("the camera|the camera|the camera|camera|camera|the shot|the view|our view|the lens"),
    "gerund": words_of("||camera|the camera|the camera is|with the camera|camera slowly|shot"),
    "order": words_of("the camera should|make the camera|let the camera|the camera begins to|have the camera"),
}
FRAMES = ("", "", "", "an image of ", "photo of ", "a photo of ", "a close-up of ", "a video of ", "view of ")
