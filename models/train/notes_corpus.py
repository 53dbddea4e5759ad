"""Operators' notes in parts: SEEN is for training and validation, UNSEEN for the held-out set alone."""

LABELS = ["urgent", "soon", "routine"]

SEEN = {
    "m": """press 2|press 4|conveyor 3|the main conveyor|compressor 1|compressor 2|lathe 5|the mill|pump P-101|pump 7|the boiler
        |extruder 2|the packer|filler 3|the palletizer|robot cell 2|oven 1|the chiller|mixer 4|line 2|line 5|the saw|fan F-12
        |the dryer|the labeller|crane 1|the cutter|gearbox 3|granulator 6|the shredder|blower B-3|centrifuge 2|the kiln|shrink tunnel 1
        |autoclave 3|the decanter|turbine T2|the winder|lift table 9|the stamping unit|cooling tower|the forklift|tank 14
        |the bagger|sifter 3|hammer mill 2|ladle crane 6|the debarker|calender 4|the thermoformer|lube station K2|the bottle washer|spray booth 1
        |degreaser 5
        |the slitter|rotary feeder 8|transfer car 11|the briquetter|wrapper 7""",
    "p": """bearing|drive belt|gearbox|motor|hydraulic hose|oil seal|pressure valve|guard|chain|coupling|control panel|air line|cooling pump
        |filter|spindle|roller|sensor|heater|fan|cylinder|door|cable|shaft|nozzle|gasket|flange|impeller|clutch|manifold|actuator
        |junction box|diaphragm|sprocket|agitator|gauge|hopper|rail|ladder
        |thrust washer|lantern ring|pulley|bushing|solenoid|torque arm|load cell|packing gland|cam follower|contactor|burner|scraper|bellows|yoke
        |gear rack|winch""",
    "open": """||||Shift B: |Night shift: |06:40 - |14:15 |Op note: |Hi, |FYI |Jan here. |Early shift, |Walk-round: |Log: |{m}: |Re {m}, |Late turn - 
        |Hello team, |22.05h |from hall C: |{m} // |Handover: |To maintenance: |Morning all, |{w}: |Note from {w}: 
        |To whom it may concern: |Second turn, |@mech |hey folks |05h30: |Piotr again. |{m} -> |Remark on {m}: |Bay 9, 
        |Dear all, |Just now: |Today: |Yesterday: |From {w}: |{w} here, |Info: |Message for the workshop: |Week {n}: |Shift C, {n}: """,
    "neutral": """|||Counter reads {n}.|Running product B since noon.|Same as what Petra wrote yesterday.|Shift lead knows.|Order {n} is on it.|Batch {n}.
        |It was {n} degrees in the hall.|Changed over at ten.|Photo is in the folder.|Written down by Tom.|Hours on the meter: {n}.
        |Started after the break.|Ticket {n} refers.|Recipe was {n}.|Ravi saw it as well.|Humid weather today.|Since the lunch hour.|Pallet no. {n}.
        |It is the one by the window.|{w} {w} {n}.|{w} was there too.|We are on {w} today.|Noticed it at {n}.
        |It is lot {n}.|Ask Carmen for details.|Same weather as last night.|We had {n} on the scale.|Wrote it in the blue book too.
        |Was doing the bottling job.
        
        |The sun shines on the window there.|We talked about it in the meeting.|My number is {n}.|It is the old one.|I wrote this for {w}.|That was before the shift change.|They brought the {p} from {w}.|Number {n} on the plan.|Was here with {w} all night.|You know which one.|Third floor, left side.|We had visitors from {w}.|The other one is the same type.|See also the sheet on the wall.|It was built by {w}.|I'm in until four.|Regards, {w}|Cheers|Greetings from {w}.""",
    "hazard": """smoke|thick smoke|black smoke|fire|flames|sparks|a burning smell|gas|steam|toxic fumes|chlorine|ammonia|acid|solvent|hot oil|boiling water
        |scalding steam|burning plastic|an explosion|an arc flash|molten metal""",
    "who": "a colleague|a worker|an operator|the driver|the new guy|someone|Marek|a fitter|one of us|a visitor|the apprentice|two people",
    "harm": """is hurt|has been injured|got burnt|is trapped in {m}|fell off {m}|got crushed by the {p}|got an electric shock from the {p}|is unconscious next to {m}
        |is bleeding badly|cannot breathe|got his fingers caught in the {p}|was hit by the {p}|has acid in the eyes|feels sick and dizzy""",
    "device": "emergency stop|e-stop|light curtain|interlock|door switch|guard|two-hand control|relief valve|brake|fire alarm|gas detector|limit switch",
    "fails": "does not work|has failed|has no effect|is broken off|does nothing when you press it|is dead|does not react|is bypassed",
    "dead": "is down|has broken down|stands still|is completely dead|has stopped for good|will not start at all|has seized|failed completely|shut itself down",
    "loss": """no production at all|the whole line is standing|nothing comes out|trucks are waiting|we are losing the batch|all lines wait|no output
        |everybody stands around|customers get nothing today""",
    "value": "pressure|temperature|speed|tank level|current|steam pressure|heat",
    "runaway": "keeps rising|is out of control|is in the red and going up|is far too high and climbing|is over the limit|runs away|shoots up",
    "breaks": "is about to fall|could collapse any moment|has torn off|broke in two|flew apart|is giving way|snapped|burst|came crashing down|ripped open",
    "noise": "squeal|whine|knock|rattle|rumble|hum|click|scraping noise|whistle|squeak|grinding sound|tick",
    "slight": "slight|small|a little|some|a bit of|minor|light|first signs of",
    "defect": "leak|seepage|play|wear|rust|cracking|vibration|slack|misalignment|corrosion|backlash|drip|oil loss|scoring|wobble",
    "often": "now and then|once a shift|every few hours|from time to time|twice a day|occasionally|sometimes|a few times a week|every other start",
    "glitch": "stops|hangs|trips|jams|loses the signal|shows a warning|needs a reset|freezes|skips a piece|loses pressure|stalls|misfeeds",
    "worse": "louder|slower|warmer|weaker|stiffer|looser|worse|noisier|rougher|thinner|hotter than usual|less accurate",
    "worn": """worn|brittle|frayed|dull|bent|loose|porous|slightly cracked|corroded|half clogged|nearly empty|slack|chipped|stiff|out of line|scratched|due for
        replacement|near the end of its life""",
    "holds": "still works|holds for now|runs on|carries on|still in use|will do for some days|not dangerous|still usable|we go on with it",
    "task": "checked|inspected|cleaned|greased|lubricated|oiled|calibrated|tested|painted|measured|adjusted|refilled|serviced|swept|wiped down|labelled|replaced|swapped|topped up",
    "fine": "ok|fine|good|normal|in order|in the green|within limits|as usual|unchanged|as it should be|all right|the same as last time|at the mark",
    "reading": "pressure|oil level|temperature|vibration|current|flow|water level|speed|air pressure|concentration|level|reading|value",
    "none": "smoke|leak|noise|smell|alarm|vibration|faults|errors|sparks|gas|damage|stops|warnings|oil on the floor|accidents|injuries",
    "fixed": "fixed|repaired|gone|solved|sorted out|dry now|replaced and fine|no longer there|closed",
    "plan": "as planned|on schedule|according to the plan|as every week|in the planned service|for the monthly check|as usual|today",
    "stuff": "gloves|rags|labels|grease|filters|ear plugs|tape|screws|pallets|film|cleaning agent|oil|paper|batteries|cartons|spare parts|towels|hand soap",
    "urgent": [
        "{hazard} from the {p} of {m}", "{hazard} at {m}", "there is {hazard} coming out of the {p}", "I see {hazard} behind {m}", "{hazard} everywhere around {m}",
        "{hazard} escaping from {m}, hall is cleared", "strong smell of gas near {m}", "{m} is on fire", "{m} caught fire", "{p} of {m} is burning",
        "{p} exploded", "{who} {harm}", "{who} {harm}", "{who} {harm}, ambulance is on its way", "accident at {m}, {who} {harm}",
        "the {device} on {m} {fails}", "{device} of {m} {fails}, it keeps moving", "you can reach into {m} while it runs, {device} {fails}", "{m} {dead}, {loss}", "{m} {dead} and {loss}",
        "{p} broke, {m} {dead}", "line {dead}, {loss}", "the {value} of {m} {runaway}", "{value} {runaway}, cannot stop it", "{value} at the {p} {runaway}",
        "the {p} of {m} {breaks}", "{p} {breaks}", "load on {m} {breaks}", "the platform above {m} {breaks}", "{m} will not stop, it runs on after stop was pushed",
        "hose burst, {hazard} is spraying everywhere", "{hazard} spraying out of the {p}", "oil all over the floor, people slip", "bare live wires hanging out of the {p}", "live cable lying in water at {m}",
        "water is flooding into the electrical cabinet", "flooding at {m}, water everywhere", "tank is overflowing, chemicals run towards the drain", "spill of solvent into the drain", "huge leak at {m}, water is pouring onto the {p}",
        "{m} is shaking violently, bolts shear off", "loud bang from the {p}, then metal pieces everywhere", "terrible grinding and now the {p} is smoking", "the {p} is glowing red", "{m} is overheating right now",
        "load is hanging by one chain on {m}, area is closed off", "power is out, {loss}", "cooling has failed, {loss}", "gas alarm went off at {m}", "{m} tripped the main breaker and stinks of burnt plastic",
        "a fork truck ran into {m}, the {p} {breaks}", "fire at the {p} put out with the extinguisher, might start again", "danger at {m}, the {p} {breaks}", "wall next to {m} {breaks}",
        "the {p} on {m} has gone up in flames", "{m} is burning, we used two extinguishers and it is not out", "dense smoke, can't see {m} any more",
        "smells like gas by {m}, my eyes water and I have a headache", "a man is stuck under {m}, we cannot get him out",
        "Sven burnt both hands on the {p}, he needs a doctor", "the girl at {m} got electrocuted but is breathing",
        "red mushroom button of {m} pressed and it went on turning", "safety gate of {m} opens while the knives still spin",
        "{m} won't move any more, the plant is at a standstill", "{p} sheared off, zero output until it is replaced, the truck drivers are queuing",
        "boiler pressure way beyond the red line and nothing brings it down", "{m} at {n} degrees, it is running hot and I can't switch it off",
        "caustic is gushing out by the {p}", "pipe has burst over {m}, the hall is under water",
        "insulation melted, the {p} is live and sparks when touched", "part of the {p} shot through the window, nearly hit Olga",
        "the hook of {m} has opened and the load dropped next to us", "pillar beside {m} is bending, we all went outside",
        "hydrogen sensor is screaming at {m}",
        "{who} fell from the ladder at {m}", "{who} is lying on the floor next to {m}", "{who} has a deep cut in the arm",
        "{who} lost a finger in {m}", "help, {who} {harm}", "it is burning under {m}", "{p} is in flames", "smouldering dust in {m}, it may ignite",
        "{m} blew up", "short circuit at the {p}, flash and smoke", "{hazard} is filling the hall", "{hazard} pouring out of {m}",
        "{hazard} shooting out of the {p}", "we breathe {hazard} here", "fumes from {m} make everyone cough", "cannot switch {m} off",
        "{m} started by itself while {who} was inside", "{m} moves although it is locked out", "{m} out of control", "no way to stop the {p}",
        "{m} is out of order, {loss}", "everything stands, {p} of {m} {breaks}", "total failure of {m}, {loss}",
        "we had to stop production, {p} {breaks}", "{m} stopped suddenly, {loss}", "big oil spill at {m}",
        "{p} leaking heavily, a stream of oil runs out", "massive leak, the pit is full", "dangerous {value}, it {runaway}",
        "{m} is about to explode, {value} {runaway}", "rack at {m} leans over, it {breaks}", "the {p} hangs loose over the walkway and {breaks}",
        "safety cover gone and blades turning open at {m}", "protective cover of the {p} missing, {m} is running", "{p} red hot",
        "emergency at {m}, {hazard}",
    ],
    "urgent_cue": """|||Send someone right now.|Need help immediately!|Hit the emergency stop.|We evacuated the area.|Asap please.|This is an emergency.|Danger of injury.
        |Nobody goes near it.|Call me at once.|Come now please.|Everything is stopped until somebody comes.|Can't wait.|Fire brigade is informed.|It is not safe to run.
        |Somebody must come straight away!|We have cleared the hall.|Pulled the main switch.|Please hurry!!|People are in danger.|Emergency!|Area is blocked.|Danger!|Stop everything.
        |Get over here this minute!|Everyone is outside.|We switched off the mains.|Life threatening.|Quick!|I need a mechanic now.|Called 112.""",
    "soon": [
        "{p} on {m} is getting {worse} every day", "{m} is getting {worse}", "{p} has become {worse} over the last days", "{p} is a bit {worse} than last week", "{noise} from the {p} of {m} since this morning",
        "{p} makes a {noise}", "there is a {noise} at the {p}, {holds}", "slight {noise} when {m} starts", "{slight} {defect} at the {p} of {m}", "{slight} {defect} on {m}, {holds}",
        "{slight} {defect} at the {p}, wiped it, comes back", "{slight} {defect} of the {p}, not growing so far", "{m} {glitch} {often}", "{m} {glitch} {often}, reset helps", "{often} {m} {glitch}, then it carries on",
        "the {p} is {worn}", "the {p} of {m} is {worn}, {holds}", "{p} {worn}, should be replaced", "{p} looks {worn}, a new one would be good", "{p} of {m} will not last the month",
        "{p} is leaking a few drops an hour, put a tray under it", "a few drops of oil under the {p} every morning", "slow air leak at the {p}, you can hear it hiss", "{m} vibrates more than last week", "{p} runs warmer than usual, about {n} degrees",
        "{p} feels warm", "pressure on {m} drops slowly overnight", "filter on {m} is nearly clogged, flow gets weaker", "display on {m} flickers and {often} freezes", "sensor at the {p} gives wrong readings {often}",
        "scrap on {m} is slowly going up, the {p} seems out of line", "{m} is slower than it should be, the {p} drags", "bolts on the {p} work loose again and again", "{m} needs more oil than normal, topped up twice this week", "coolant on {m} runs low faster than it should",
        "door of {m} sticks and has to be pushed", "play in the {p} of {m}, measured {n} hundredths", "last spare {p} and this one is wearing out", "{m} starts hard in the cold, motor hums for a few seconds", "cut quality is getting worse, blade is dull",
        "hairline crack at the {p}, {holds}", "seal of the {p} no longer closes tight", "roller is running off centre, eats the edge of the belt", "battery warning on {m} since yesterday", "{m} shows warning {n}, {holds}",
        "cycle time creeping up on {m}", "{p} squeaks, grease helps for a day only", "touch screen of {m} reacts late", "rubber of the {p} is {worn}", "vibration on the {p} is up a bit, still within limits",
        "{p} slips {often} under load", "{value} of {m} a little higher than usual, not alarming", "{p} needs changing in the next weeks", "{m} {glitch} more often than before",
        "the {p} has started to sing, louder than on Monday", "{m} sounds rough when it runs up",
        "there is a bit of oil round the {p}, about a spoonful a day", "damp patch under {m}, grows slowly", "the {p} wobbles slightly",
        "{p} about {n} degrees warmer than its twin", "I would change the {p} in the next service, it is nearly worn through",
        "the lining of the {p} has become thin but does its job", "every second day {m} drops out and must be restarted",
        "the strap is fraying, a week or two is left in it", "suction is weaker than in spring, probably the filter", "{m} hesitates at start",
        "keypad of {m} only takes a press at the third try", "the scale at {m} drifts by some grams a day",
        "we reject more pieces than we used to, maybe the {p} is out of true",
        "fine crack in the paint over the weld of the {p}, please have it examined", "the nuts on the {p} need retightening each Monday",
        "compressed air consumption of {m} has crept up", "hinge of the cover is bent, it closes with a bit of force",
        "{m} reports low battery but goes on",
        "{p} starting to go, {holds}", "{p} on its last legs, {holds}", "{p} shows signs of ageing", "{p} gets a bit warm",
        "{m} a little unsteady at high speed", "{m} runs rough but {holds}", "I hear a {noise} in {m} {often}", "{noise} at {m} comes and goes",
        "{m} occasionally {glitch}", "it happens {often} that {m} {glitch}", "{m} {glitch}, we restart it and go on",
        "{defect} at the {p} has increased", "{defect} on {m} more than a month ago", "{p} loses some oil", "drips under the {p}, bucket is there",
        "the {p} should be renewed soon", "recommend a new {p} for {m}", "please plan a new {p}", "{p} of {m} wants adjusting",
        "{p} has to be tightened every day", "quality on {m} slowly drops", "more rejects at {m} than last month", "{m} makes burrs, tool is {worn}",
        "{m} takes longer to warm up", "{m} draws more current than it did", "{reading} of {m} drifts {often}", "{reading} at the {p} slightly off",
        "{p} {worse} each week", "{m} is due for service, {p} {worn}", "{p} only half as good as new", "warning lamp on {m} lights up {often}",
        "error {n} on {m} {often}, can be cleared",
    ],
    "soon_cue": """|||Still running.|Please look at it this week.|Should be fixed in the next days.|Can wait until the weekend.|Keep an eye on it.|Plan it for the next stop.
        |Will get worse.|Not critical yet.|Please order the part.|Have a look when you can, not today.|We can run till Friday.|Maintenance should check it.
        |Put it on the list for this week.|No danger at the moment.|Runs for now.|Would be good to repair it within the week.|Schedule it for Saturday.|Please watch it.
        |Won't hold forever.|Nothing dangerous yet.|Next week is fine.|Needs looking at.|Has to be repaired at some point soon.
        |It can go on for a few days.|Not today, but before the month ends.|Could you put that in the plan for next week?|It's working so far.
        |Worth a look soon.|Get a spare in.|I'd rather not wait a month.""",
    "routine": [
        "{m} {task}, everything {fine}", "{task} {m}, all {fine}", "{task} the {p} {plan}", "{p} {task} {plan}", "the {p} of {m} was {task}, {fine}",
        "we {task} the {p} and {task} {m}", "{reading} of {m} is {fine}", "{reading} {fine}, {reading} {fine}", "{reading} {n}, {fine}", "{reading} on the {p} {fine}",
        "no {none}, no {none} on {m}", "no {none} at the {p}", "no {none}, everything {fine}", "{m} runs without {none}", "no {none} today",
        "{defect} at the {p} is {fixed}", "{noise} at {m} is {fixed}", "the {defect} from last week is {fixed}", "{m} is {fixed}, runs well again", "please order {stuff}",
        "{stuff} delivered, put on the shelf", "we need more {stuff}, order with the next delivery", "took {stuff} from the store", "running out of {stuff}, please order", "new {p} arrived and is in the store",
        "daily check of {m} done, nothing to report", "nothing special at {m}", "weekly lubrication done", "round finished, all {fine}", "changed the filter on {m}, next one due in {n} hours",
        "{m} runs smoothly after the service", "{m} running well", "meter reading {n} for the monthly report", "handed {m} over to the next shift in good order", "{m} was switched off for the weekend",
        "{m} shut down {plan}", "inspection sticker on {m} renewed", "training for two new colleagues at {m}", "showed the trainee {m}", "changeover on {m} took {n} minutes",
        "tested the {device} on {m}, works", "{device} test passed", "fire extinguisher next to {m} inspected, valid until next year", "fire drill went well, everybody was out in time", "tidied up the tools at {m}",
        "target reached on {m}, {n} pieces", "quiet shift, no stops", "updated the checklist for {m}", "new version of the instructions hangs at {m}", "emptied the bins and the tray of {m}",
        "washed the floor around {m}", "software of {m} updated, starts normally", "visitors were shown {m}", "light bulb above {m} changed", "signed the log for {m}", "figures of {m} noted, {fine}", "audit of {m} went well",
        "finished the tour, {m} in good shape", "had a look at the {p}, as new", "dry and quiet around {m}, no sparks or fumes",
        "{p} got its grease {plan}", "{m} is clean again and the scrap is gone", "fitted the new {p} during the service, it turns nicely",
        "gauge on {m} says {n}, where it belongs", "oil sample of {m} taken and sent off", "{m} back in production after the overhaul, no complaints",
        "three boxes of {p}s came in today", "paper towels and marker pens are low, add them to the list", "{m} has {n} hours for the statistics",
        "night crew takes over {m} in good condition", "emergency lights and e-stops tried out, all of them work",
        "extinguisher by {m} has its new seal", "load cell calibration certificate filed", "no more dripping at the {p} since Tuesday's repair",
        "school class visited {m}, all went well", "we made {n} units without a single stop", "{m} parked and locked for the holidays",
        "{task} and {task} the {p}, no complaints", "{m} inspected, nothing found", "{p} looks like new", "{m} works perfectly",
        "nothing to complain about at {m}", "{m} in good condition", "no abnormal {none} at {m}", "{m} is quiet and dry",
        "neither {none} nor {none} at {m}", "{none} checked at {m}, none found", "the {p} is tight and dry", "all readings {fine}",
        "{reading} noted for {m}", "wrote down the {reading} of {m}", "{reading} taken and filed", "report for {m} sent", "certificate of {m} filed",
        "documents for {m} are in the folder", "{stuff} arrived", "a box of {stuff} came in", "{stuff} are low, put on the shopping list",
        "order {stuff} please", "stocktaking done, {n} pieces of {stuff}", "{p}s are back in stock", "shift handover without remarks",
        "{m} given to the next crew", "started {m} after the holidays, ran up normally", "{m} locked for the night",
        "{m} back in use after the service", "repair of the {p} finished, test run {fine}", "{m} was repaired yesterday and runs well",
        "{device} tried out, works as it should", "first aid box refilled", "fire doors and extinguishers checked, {fine}", "safety briefing held",
        "meeting at nine about {m}", "made {n} parts on {m}", "order {n} finished on {m}", "{m} set up for the next order",
        "{m} had its yearly inspection, passed",
    ],
    "routine_cue": """|||No action needed.|Just for the record.|All good.|Nothing else.|Done.|Next check in a month.|Everything normal.|Only for information.|As planned.|Thanks.
        |No problems.|Have a nice weekend.|Ticket can be closed.|See you tomorrow.|No need to do anything.|For your information only.|All fine.|That's all.|Job finished.
        |Everything as usual.|Nothing to do.|Finished.
        |Nothing open.|No follow-up.|Everything is fine here.|Just so you know.|Have a good one.|Completed.|Business as usual.""",
}

UNSEEN = {
    "m": """the bandsaw|pelletizer 3|flow wrapper 2|furnace 6|the depalletizer|rolling mill 4|the carton erector|vacuum pump V9|the crate washer
        |paint line 1|sandblaster 5|the edger|bucket elevator 8|shuttle 11|the pulper|tray sealer 7""",
    "p": "ball screw|slip ring|tappet|bush|relay|rocker|thermocouple|stuffing box|camshaft|fuse holder|ignition unit|wiper|piston|fork|rack|drum",
    "open": "|||For the fitters: |Turn 2, |Hey, |4.45 am: |Ines writes: |{m} >> |About {m}: |Hall 7, |hello maintenance ",
    "neutral": "||It is job {n}.|Hamid knows the details.|Raining since five.|Weighed {n} before.|It is in the red folder too.|Was packing yoghurt then.",
    "urgent": [
        "we have a fire in {m}", "flames licking out of the {p}", "{m} full of smoke, we can't see the {p}", "smoke and sparks when {m} was switched on", "it reeks of gas around {m} and the alarm is sounding",
        "a colleague was pulled into {m} and is injured", "Dana has burnt her face at the {p}", "man down beside {m}, not breathing", "electric shock at the {p}, he fell off the ladder", "the emergency stop of {m} is dead, machine keeps running",
        "{m} is running with the guard open and the interlock does not stop it", "the {p} broke and {m} has stopped, nothing can be produced", "whole line down because of {m}, we are losing every batch", "pressure in {m} is climbing over the limit, valve does not open", "{m} overheats, temperature is rising out of control",
        "acid leak at {m}, it is eating into the floor", "steam pipe burst next to the {p}", "water pours into the control cabinet of {m}", "uninsulated live wire touching {m}", "{p} flew off and hit the wall, somebody could have been killed", "the load on {m} has slipped and is about to fall", "brake of {m} gone, it cannot be stopped",
    ],
    "urgent_cue": "|||Come immediately!|All staff have left the building.|Power is cut off.|Very dangerous.|Hurry up please.|We need somebody this second.|Ambulance called.",
    "soon": [
        "grinding from the {p} that gets louder week by week", "{m} has begun to squeak while running up", "small drip of oil at the {p}, one cup per shift", "{p} is seeping a little, rag under it for now", "{m} shows more vibration than in the last weeks",
        "the {p} is a bit hotter than normal", "{p} nearly worn out, please replace it during the next service", "wear visible on the {p}, still ok for some days", "{m} stops by itself every now and then, comes back after a reset", "belt of {m} is cracked at the edges, still pulling",
        "filter getting clogged, air flow is weaker than before", "{m} is slow to start in the morning", "buttons on {m} react only sometimes", "sensor of {m} drifts, readings are slightly wrong", "scrap rate on {m} a bit higher, {p} may be worn",
        "tiny crack at the {p}, has not grown since last week", "screws on the {p} loosen again after a few days", "{m} is using more air than usual, probably a small leak", "door hinge of {m} is bent and sticks", "{m} shows a low oil warning from time to time", "some play in the {p}, should be adjusted", "seal at the {p} is getting hard and brittle",
    ],
    "soon_cue": "|||Runs for the time being.|Please repair before the end of the month.|Can you plan it for next week?|It still does its job.|Should be looked at soon.|We need a spare for it.|Don't leave it too long.",
    "routine": [
        "inspection of {m} completed without findings", "looked over the {p}, everything normal", "no smoke or leaks anywhere near {m}", "greased the {p} as on every Monday", "cleaned out {m} and swept the floor", "planned change of the {p} finished, {m} running fine",
        "pressure and temperature of {m} as usual", "oil level at {m} checked, is at the mark", "{m} runs well again after the repair", "package with {p}s delivered, it is in the store", "please order gloves and cleaning rags for {m}", "noted {n} hours on {m} for the report",
        "{m} handed to the night shift without problems", "emergency stop at {m} tested and works", "fire extinguishers at {m} checked, all valid", "calibration of the {p} done, within limits", "the leak at the {p} has been repaired, is dry now", "showed {m} to the new colleagues", "{n} pieces made today, no stops and no faults", "{m} switched off as planned for the weekend", "vibration check on {m}, values unchanged", "bins at {m} emptied and tools put away",
    ],
    "routine_cue": "|||Nothing to be done.|No remarks.|All is well.|For info.|Good night.|Finished for today.|Everything is normal.",
}

for words in [SEEN, UNSEEN]:
    for key, value in words.items():
        if isinstance(value, str):
            words[key] = [" ".join(v.split()) + " " * (key == "open" and bool(v.strip())) for v in value.split("|")]

SHORT = {
    "pressure": "press.", "temperature": "temp", "bearing": "brg", "vibration": "vib", "please": "pls", "maintenance": "maint", "conveyor": "conv",
    "compressor": "compr", "hydraulic": "hydr", "emergency": "emerg", "and": "&", "replaced": "repl.", "checked": "chkd", "with": "w/",
}
SHORT_UNSEEN = {
    "degrees": "deg", "hours": "hrs", "because": "bc", "please": "plz", "pieces": "pcs", "about": "abt", "pressure": "prs", "normal": "nrml",
    "before": "b4", "everything": "evrything", "extinguisher": "ext.", "production": "prod", "without": "w/o", "service": "svc",
}
