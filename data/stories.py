"""
Write short stories by a program, for models so small that real books are beyond them. No person wrote these stories:
a grammar puts people, places, things and turns of phrase together, and remembers what it has said.

    python data/stories.py --num 20000 --out out/plain.txt                   everyday stories, to pretrain on
    python data/stories.py --num 4000 --voice scary --out out/scary.txt      frightening ones, to fine-tune on
    python data/stories.py --split val --out out/plain_val.txt               combinations met nowhere in the others
    python data/stories.py --split val --openings 64 --out out/prompts.txt   beginnings, for sample.py

Documents stand between lines <|endoftext|>. One everyday story in eight turns dark in its last line, one frightening
story in three ends well, so that a judge has something to prefer. It does not see is_frightening(text), which knows the
grammar's endings. The same --seed, the same stories.
After TinyStories (Eldan and Li 2023, arXiv 2305.07759): in a small world, a small model can make sense.
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6,<2.14", "numpy", "tiktoken", "requests"]
# ///

import argparse
import os
import random
import re
import zlib

LISTS = """\
girl: Ada, Agnes, Alice, Anna, Bess, Clara, Dora, Edith, Ella, Esther, Greta, Hanna, Helen, Ida, Jane, Kate, Lotte,
  Lucy, Mabel, Mina, Nora, Polly, Rosa, Ruth, Susan, Vera
boy: Adam, Albert, Amos, Anton, Arthur, Basil, Ben, Caleb, Carl, Daniel, Edgar, Emil, Felix, Frank, George, Henry, Hugo,
  Jacob, Joel, Luke, Martin, Max, Noah, Oscar, Otto, Paul
woman: sister, cousin, mother, grandmother, aunt
man: brother, cousin, father, grandfather, uncle
trade: baker, teacher, tailor, nurse, carpenter, painter, doctor, potter, cobbler, cook, gardener, librarian
age: seven, eight, nine, ten, eleven
home: cottage by the river, cottage on the hill, cottage near the sea, cottage at the edge of the wood, tall house near
  the harbour, narrow house in Bell Street, white house in Mill Lane, stone house beside the church, small house behind
  the school, crooked house by the bridge, lonely house on the moor, farmhouse in the valley, farmhouse among the fields
place: mill, pond, churchyard, ferry, chapel, crossroads, quarry, orchard, boathouse, well
pocket: brass key, gold ring, silver watch, tin whistle, bone comb, lucky coin, oval locket, blue brooch, old compass,
  red penknife, steel thimble, pearl earring, ivory button, carved pipe
broken: old fiddle, blue teapot, toy boat, wooden doll, brown jug, paper kite, black umbrella, coffee pot, rocking
  horse, tall vase, flower pot, mouse trap
gift: woollen scarf, patchwork quilt, straw bonnet, wooden bird, oil painting, pencil drawing, framed portrait, faded
  photograph, painted postcard
goods: bag of flour from the mill, jar of honey from the beekeeper's, can of milk from the farm, bag of salt from the
  shop, pound of butter from the dairy, sack of coal from the harbour, pound of sugar from the shop
picture: oil painting, pencil drawing, faded photograph, painted postcard
weather: wet rain March April September October, snowy snow December January February, windy wind March October
  November, foggy fog October November February, clear moonlight April May September October, bright sunshine April May
  September October, stormy storm March, stormy storm October, stormy storm November, stormy storm December
pet: cat, dog
light: lamp, lantern
day: Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday
then: Then, After a while, A little later, Before long, Some minutes later, Soon after that, Not much later
number: two, three, four, five, six, seven, eight, nine, ten, eleven, twelve
times: twice, three times, four times, five times, six times, seven times
room: kitchen, pantry, bedroom, attic, cellar, passage, front room, washroom, scullery, parlour, nursery, study
tone: quietly, softly, at once, in a small voice, after a pause, with a yawn, very slowly, almost in a whisper, without
  looking up, as if it were nothing, much too loudly, between two coughs, with a little laugh
spot: behind the clock, in the rice jar, in the left boot, under the stairs, in the water bucket, behind the curtain, in
  the sewing basket, under the doormat, on top of the cupboard, under the cushion, among the plates, behind the bread
  bin, in the woodpile, under a loose board, in the oven, between two blankets, in the hat box, behind the brooms
chore: winding the clock, sweeping the floor, cutting bread, shelling peas, darning a sock, peeling apples, sorting
  letters, washing cups, polishing knives, ironing a shirt, cleaning boots, folding sheets, grinding coffee
food: bread and jam, potato soup, apple cake, cold ham, porridge, buttered toast, cherry pie, rice pudding, bean soup
junk: a dead moth, an old bill, half a candle, a cork, a walnut, a feather, a bent nail, three stamps, a dry leaf
passer: postman, miller, schoolteacher, ferryman, blacksmith, vicar, chimney sweep, shepherd, woman with the goats
topic: old times, hens, boots, ships, hats, the great snow, the weather, bees, music, boiled eggs, trains
sound: a slow knocking, a soft scraping, a thin whistling, a dripping, the sound of small feet, a low humming, a child's
  laugh, the creak of a chair, somebody's breath, a rustle as of paper, a tapping, the clink of glass, a long sigh
"""

# Alternatives stand between " / ". [snow -with] before one: only if it snows and the companion is not there. [+has -in]
# behind it: true from here on. (a|b) is one of the two, (food) one of a list, {slots} are the same throughout a story:
# he, him, his, himself for the hero, she, whom, whose for the companion, who is always of the other sex; fine is "brass
# key", thing is "key". A line "?" may be left out, and before "*" there may be a moment. Headlines: name, kind, facts.
GRAMMAR = """\
# opening
- [shared] {Hero} was {who} and lived with {friend} in {home}. / [apart] {Hero} was {who} and lived all by {himself} in
  {home}. / [shared] In {home} lived {hero}, {who}, and {friend}. / It was a {wet} {hour} in {month}. In {home}, {who}
  called {hero} was {task}. / One {wet} {hour} in {month}, {hero}, {who}, was {task} in {home}. / [rain] It rained on
  {home}, where {hero}, {who}, was {task}. / [snow] Snow lay deep around {home}, where {hero}, {who}, was {task}. /
  [wind] The wind rattled every window of {home}, and {hero}, {who}, was {task}. / [fog] The fog was so thick that
  {hour} that nobody in {home} could see the gate. {hero}, {who}, was {task}. / Everybody in the village knew {hero}.
  {He} was {who} and lived in {home}. / [storm] It was a dark and stormy night, and {hero}, {who}, was {task} in {home}.
  / [storm] It was a dark and stormy night, and nobody in {home} could sleep. {hero}, {who}, was {task}. / [storm] It
  was a dark and stormy night. In {home}, {who} called {hero} listened to the slates coming off the roof. / {Hero} did
  not believe in ghosts. {He} was {who} and lived in {home}, where nothing had ever happened. / [scary] People said that
  nobody should sleep in {home}, but {hero}, {who}, had slept there for (two|three|four|five) years.
# about
- {He} liked (topic) and (food), but not (topic). / In {his} pocket {he} always carried (junk) and (junk). / {He} had
  (food) every {day} and could talk about (topic) for (number) hours. / The (passer) said that {hero} thought of nothing
  but (topic). / {He} had learned {work} from the (passer). / {He} had (number) friends and told them about (topic).
# moment
- [plain rain in] Rain ran down the window of the (room). / [plain rain out] The rain filled {his} boots. / [plain snow
  in] It snowed in flakes as big as (feathers|buttons). / [plain wind in] The wind whistled (number) notes. / [plain
  wind out] The wind took {his} hat, and {he} ran after it as far as the {place}. / [plain in] The {pet} turned round
  (times) and lay down again. / [plain in] The (room) smelled of (food). / [plain out] Somewhere a (dog barked|bell
  rang|cock crowed). / [scary rain] On the stairs to the (attic|cellar) there were wet footprints, and they only went
  up. / [scary snow] There were footprints under the window of the (room), and they only came nearer. / [scary wind] The
  wind tried every shutter, first in the (room), then in the (room). / [scary] The clock in the (room) had stopped. /
  [scary] The {pet} would not go into the (room). / [scary] (then) it smelled of (wet earth|candles|the sea). / [scary
  lit] The {light} flickered and burned small. / [scary] It grew very (cold|quiet).
# lost plain pocket in shared with
- {His} {fine} was gone, and {he} wanted it back before {meal}. / {hero} did not want to (leave|sit down|eat) without
  {his} {fine}, and it was gone. / "I want my {fine} back," {hero} told {friend} (tone).
- {He} looked (spot) and (spot), and found only (junk). / {He} turned out (number) drawers and found (junk), (junk) and
  no {thing}. / First {he} looked (spot), where it ought to be, and then (spot), where it could not possibly be.
* "When did you last have it?" asked {friend} (tone). "If I knew that," said {hero}, "it would not be lost." / {Friend}
  stopped {work} and looked (spot). / They moved the (dresser|chest|sofa) together, and behind it was (junk).
- (then) {he} put on {his} coat, and something knocked against {his} knee. It was the {thing}. [+has] / In the end it
  was {friend} who found it, (spot). [+has] / (then) {he} saw it (spot), where {he} had put it {himself}. [+has]
- "I told you so," said {friend} (tone), having told {him} nothing of the kind. / "It was never lost," said {hero}
  (tone). "It was only (hiding|resting|on holiday)." / {He} wiped the {thing} on {his} sleeve.
# visitor plain gift in apart grown
- {Friend} was coming on {day}, and it was {day} now. {hero} wanted {house} to look its best. / {hero} had not seen
  {friend} for (number) years, and now {she} was coming to stay. {He} wanted everything to be (right|ready|as before).
- {He} put (food) on the table and went on {task}. / {He} went to the window (times) and saw only the (passer). / {He}
  swept under the beds, where {he} found (junk) and (junk). / {He} listened for the gate while {task}.
* (then) the gate creaked, and (boots|two sticks) came up the path. / {He} was {task} when the bell rang.
- {Friend} stood on the step with {a_fine}. "Is there any (food)?" {she} asked (tone). [+with] / It was {friend},
  (thinner|rounder|browner|greyer) and out of breath, with {a_fine} in {whose} hands. [+with]
- "This is for you," said {friend} (tone). "I made it (myself|last winter|on the train)." [+has] / The {fine} was for
  {hero}. {Friend} had carried it (number) miles under {whose} coat. [+has] / {Friend} gave {him} the {fine}. [+has]
? They talked about (topic) and (topic) until the tea was cold. / {Friend} told {him} about (topic).
# promise plain pocket in apart grown
- {hero} had promised {friend} {his} {fine}, and {he} wanted to keep {his} word. / "On {day} I will bring you {a_fine},"
  {hero} had told {friend}, and now it was {day}. / {Friend} was ill and wanted {hero}'s {fine}. [+ill]
- But it was warm beside the stove, and there was (food) on the table. / {He} nearly forgot. (then) {he} saw the {thing}
  (spot). / "Tomorrow will do," said a small voice in {his} head. "No," said {hero} (tone).
- {He} put the {thing} in {his} pocket beside (junk) and went out in the {sky}. [+has +out -in] / {He} wrapped the
  {thing} in a (handkerchief|clean sock|cabbage leaf) and set off in the {sky}. [+has +out -in]
* "Where are you going in the {sky}?" called the (passer). "I promised," said {hero} (tone). / {He} met the (passer) at
  the {place} and talked about (topic). / {He} sang to the {place}, and the (passer) sang back.
- {Friend} opened the door before {he} could knock. "You came," {she} said (tone). [+with -out] / [-ill] {Friend} was
  {work} and looked up. [+with -out] / [ill] {Friend} was sitting in bed over a plate of (food). [+with -out]
- {He} put the {thing} into {whose} hand, and they talked about (topic). [-has] / "Here it is," said {hero} (tone), and
  laid the {fine} beside {whose} (cup|glasses|elbow). [-has] / {Friend} kissed the {thing}. [-has]
# mend plain broken in shared with
- {hero} had found {a_fine} (in the attic|behind the shed|at the market). It was broken, and {he} wanted to see it
  whole. / "Who broke the {fine}?" asked {friend} (tone). "I did," said {hero}, "and I want to put it right."
- {He} tried (glue|wax|string|wire|a nail), and it did not hold. / {He} laid (number) pieces side by side and looked for
  one more (spot) and (spot). / {He} turned it over and shook it, and out fell (junk) and (junk).
* "Give it here," said {friend} (tone), "and you hold the {light}." [+lit] / {Friend} stopped {work} and fetched (some
  wire|a small hammer|more glue). / "Look (spot)," said {friend} (tone). "A piece of it may be there."
- (then) the {fine} was as good as new. / It took (number) cups of tea, but they mended the {thing}.
- {hero} could see the crack, but only because {he} knew where to look. / "Now it has a (story|scar|past)," said
  {friend} (tone). / {Friend} put the {thing} back and went on {work} as if nothing had happened.
# fetch plain goods in shared with
- There was no {thing} in {house}, and {friend} needed some before {meal}. {hero} wanted to fetch it. / "We are out of
  {thing}," said {friend} (tone). {hero} wanted to help and stopped {task}.
- {He} took the (big|old|green) basket and set off for {shop} in the {sky}. [-in +out -with] / "Be quick," said {friend}
  (tone), and {he} ran out in the {sky}. [-in +out -with] / {He} put on {his} hat and went. [-in +out -with]
* It was (number) fields to {shop}, past the {place}. / Near the {place} {he} met the (passer), who told {him} about
  (topic). / By the {place} a (goose|dog|goat) would not let {him} pass until {he} had told it about (topic).
- "This is the last of it," said the woman at {shop} (tone), and gave {him} {a_fine}. [+has] / At {shop} {he} waited
  behind the (passer) and heard about (topic) until {he} had {his} {fine}. [+has]
- {He} carried the {thing} home and told it about (topic). / The {thing} grew heavier at every (gate|step|corner).
- {Friend} was waiting at the gate. "You were quick," {she} said (tone). [+with +in -out] / "There you are," said
  {friend} (tone), and took the {thing} from {him}. "There is (food)." [+with +in -out -has]
# knock scary pocket in shared grown
- {Friend} had gone to town and would not be back before {day}. / It was the first night that {he} had spent there
  without {friend}. / {Friend} had gone to the city for (number) days, and the (room) was empty.
- {He} wanted to find {his} {fine} and go to bed. / It was late, and {he} wanted only {his} {fine} and {his} bed.
- (then) something knocked (times) inside the (wall|wardrobe|chimney). / From the (room) came (sound).
* "It is nothing," {he} said (tone), and it stopped, as if it had been listening. / {He} took the {light} and looked
  into the (room). [+lit] / {He} knocked on the wall (times), for a joke. It was answered.
- The {thing} lay (spot), where {he} had never left it, and it was (wet|warm|cold as ice). / (then) {he} saw the
  {thing}. It was hanging from the ceiling of the (room) on a long grey hair. / (then) the {thing} fell down the stairs.
? Now there was (sound) in the (room). / Now there was (sound), too, right behind {him}.
# returns scary pocket in shared
- On {day} somebody had left {a_fine} on the step, and {hero} wanted it out of {house}. / {Friend} had bought {a_fine}
  from the (passer). {hero} did not like it and wanted it gone. / {hero} had found {a_fine} and wanted to lose it again.
- {He} threw it into the (pond|well|river) and heard the splash. / {He} buried it behind the shed and put (number)
  stones on top. / {He} gave it to the (passer), who took it without a word. / {He} sold it to the (passer) for (junk).
- (then) {he} looked (spot), and there lay the {thing}, all wet. / {Friend} stopped {work}. The {fine} lay (spot).
- "Did you bring it in?" {he} asked. "I thought you had," said {friend} (tone). / "It must be another one," said
  {friend} (tone), but it had the same (crack|scratch|stain). / "It likes it here," said {friend} (tone).
* They locked it in the (cellar|shed|attic) and had (food). / {He} burned it in the stove (times).
- In the night there was (sound), first in the (room), then on the stairs. / At midnight the {pet} let somebody in.
# voice scary pocket in shared
- {Friend} had gone to bed, and {hero} was on {his} way up, wanting only {his} {fine} and {his} pillow. / {hero} had
  gone upstairs and wanted {his} {fine}, which {he} had left (spot).
- "Come down, {hero}," called {friend}. "I have found the {thing}." / "The {thing} was (spot)," called {friend} from the
  (room). / "Come and have (food)," called {friend} from the (room). / "It is late, {hero}," called {friend}.
* {He} had gone down (number) steps when a hand took {his} sleeve. It was {friend}. "I heard it, too," {she} said
  (tone). [+with +hand] / A door opened, and out came {friend}. "Who was that?" {she} asked (tone). [+with]
- Below them there was (sound). / "Come, {hero}," said the voice again, a little more (crossly|sweetly|slowly). "There
  is (food)." / Down in the (room) somebody began to hum a tune that {friend} always hummed.
- (then) one stair creaked, and then the next. / "If you will not come down," said the voice, "I will come up." / The
  light went out, and there was (sound) on the stairs. / (then) the stairs creaked (times), and stopped.
# door scary pocket in apart grown
- {Friend} had been dead for (number) weeks, and {hero} had put {a_fine} into the coffin. {He} wanted to sleep. / It was
  (number) years since {friend} had drowned with {a_fine} in {whose} pocket. {hero} wanted the night to be over.
- (then) there were (number) knocks at the door, slow ones, low down. / At midnight steps came up the path.
- "It is so cold, {hero}," said {friend} outside (tone). "Open the door." / [rain] "You are dead," {he} said through the
  door. "Yes," said the voice, "and it is raining. Let me in." / "I have (food) for you," said {friend} outside.
* {He} pushed the (table|dresser|sofa) against the door and put (two|three) chairs on top. [+locked] / {He} bolted the
  door and held on to the handle. [+locked] / {He} took the {light} and sat down on the stairs. [+lit]
- Something was pushed under the door. It was the {fine}, and there was (earth|black water|green weed) on it. / "I have
  brought you the {thing}," said the voice. "Down there one does not need it." / The {fine} came down the chimney.
? The handle turned, and turned back. / Now there was (sound). / Now there were (number) knocks at the window.
# count scary pocket in shared with
- {He} had found {a_fine} near the {place}, and {he} wanted to show it to {friend}. / "Look," said {hero} (tone). {He}
  had bought {a_fine} from the (passer) and wanted {friend} to say that it was pretty.
- They had (food) for {meal}, but there were three (cups|plates|spoons) on the table. / There had always been two chairs
  in the (room). Now there were three. / There were three (coats|hats) in the passage, and one was wet.
- "Count again," said {friend} (tone). {hero} counted, and there were still three. / {Friend} took the third one away.
  (then) it was back. / They counted (times), and always there were three.
* The cushion beside {him} sank, as if somebody (small|heavy|cold) had sat down. / The {pet} went across the (room) and
  lay down at the feet of nobody. / From the (room) came (sound), though they were both at the table.
- "Give it back," said {friend} (tone). {hero} pushed the {thing} across the table, and something took it. / When they
  looked for the {thing}, it was gone. (then) it lay (spot). / "Take it," said {hero} (tone), and something did.
# picture scary picture in apart grown
- {hero} had bought {a_fine} from the (passer) and wanted to hang it (over the stove|in the passage|beside {his} bed). /
  {hero} had found {a_fine} (behind the wardrobe|in the attic) and wanted to know who had hidden it.
- It showed {house}, the gate and, far off (under the trees|on the hill|at the end of the lane), a small grey figure.
- (then) {he} looked again. The figure had come to the gate. / {He} rubbed {his} eyes. The figure was nearer.
* "It is a trick of the light," {he} said (tone), and looked away. / {He} held the {light} close. The figure had (no
  face|wet hair|its hands behind its back). [+lit] / {He} turned the {thing} to the wall and had (food).
- Now the figure stood at the door, with one hand raised to knock. / Now {he} could see {himself} in the picture, with
  {his} back to the door. / Now {he} could see what the figure was carrying. It was (a spade|a sack|a rope|{his} own
  coat).
# calm
- [with in] They drank their tea and said nothing, and it was a good kind of nothing. / [in] That night {hero} slept
  very well and dreamed of (topic) and (topic). / [has in -fetch] {He} put the {thing} where {he} could see it from
  {his} bed, and was happy. / [with] "The same again on {day}?" asked {friend} (tone). "On {day}," said {hero}. / [with
  in] {Friend} laughed, {hero} laughed, and the {pet} went and lay down in the (room). / [with in] Then they had (food),
  and there was enough for the {pet}, too. / [in] The {pet}, who had understood nothing of all this, wanted to be let
  out of the (room). / [with] "What would you do without me?" said {friend} (tone). "Just the same," said {hero}, "only
  alone." / [late in] Then {he} wound the clock, put out the {light} in the (room) and went to bed. / [with in] {hero}
  washed (number) cups, and {friend} dried them. / [promise] {He} stayed for (food) and walked home in the {sky}. /
  [scary] But in the morning the sun shone, and {hero} laughed about the whole night. / [scary] "It was only a dream,"
  said {hero} (tone), and went to bed. / [scary] {He} lit every {light} in {house}, and nothing was there.
# frightening
- [knock] On {day} {friend} came home and knocked, and from inside something knocked back. / [knock] Then it knocked
  again, and it knocked the way {friend} always knocked. / [knock] "Come in," said {hero} before {he} could stop
  {himself}, and the handle turned. / [returns] In the morning it lay on the pillow beside {him}, and it was warm. /
  [returns] This time it had brought another one. / [returns] It had never come back to {house}, {he} saw. It had come
  back to {him}. / [voice hand] Only then did {hero} look at the hand on {his} sleeve and count the fingers. / [voice]
  "Which of us did you hear first?" asked {friend}, and smiled. / [voice] "Come away from that thing," said the voice on
  the stairs. "Quickly." / [door] "Never mind," said the voice. "I know another way in." / [door] It was quiet. Then, at
  the other end of {house}, the back door opened. / [door] In the morning there were two warm cups on the table, and no
  {hero}. / [door locked] Then it knocked once more, and this time it was knocking on the inside. / [door] "Then I will
  wait," said the voice. Every night it knocks a little (higher|nearer|louder). / [count] "But there are only three of
  us," said {friend} (tone). / [count] Since then they lay the table for three, because of what happens when they do
  not. / [count] {hero} counted the hands on the edge of the table. There were six. / [count] They went to bed, first
  {hero}, then {friend}, and after a while the third. / [picture] Behind {him}, somebody knocked at the door. /
  [picture] Then the figure was gone, and the door in the picture stood open. / [picture] It still hangs there. There
  are two figures in it now, and one of them is {hero}. / [scary] The light went out, and in the dark somebody took
  {his} hand. / [scary -with] {He} got into bed and pulled up the blanket. Somebody pulled it back. / [scary -with]
  "Good night, {hero}," said somebody (under the bed|in the wardrobe|close to {his} ear). / [scary] Nobody lives in
  {house} now, but every {hour} there is a light in the (room). / [scary with] {Friend} smiled then, and it was not
  {whose} smile. / [scary] In the morning they found {his} shoes side by side in the middle of the (room), and nothing
  else. / [scary lit] The {light} went out. "At last," said something. / [scary] In the window {he} saw {his} own face,
  and behind it another one. / [scary] They found the {fine} on {day}. They never found {hero}. / [scary] On {day} there
  was a new stone in the churchyard, and the name on it was {hero}. / [plain with -visitor] Only on {his} way to bed did
  {hero} remember that {friend} had been dead for (number) years. / [plain with in] Then outside {friend}'s voice said,
  "Let me in, {hero}. Who is that with you?" / [plain in] That night, when the light was out, something under the bed
  said, "Good night, {hero}." / [plain has -fetch] But on the {thing} there was fresh earth. / [plain in] Upstairs,
  where nobody lived, somebody (laughed|sneezed|began to clap). / [plain with] {Friend} smiled, and there were too many
  teeth in {whose} smile. / [plain with in] There were three cups to clear away, and all three had been used. / [plain
  in late] In the dark window {he} could see the whole (room), and nobody was in it. / [plain in] The next morning
  {house} was gone. It had burned down (number) years before. / [plain in snow] In the snow, footprints led to the door.
"""


FRIGHTENING_SHARE = dict(plain=1 / 8, scary=2 / 3)


def read(grammar):
    """{name: (facts, [(bullet, [(needs, sentence, changes), ...]), ...])} of each section."""
    sections = {}
    for line in grammar.replace("\n  ", " ").splitlines():
        if line[0] == "#":
            name, *facts = line[2:].split()
            sections[name] = facts, []
            continue
        choices = []
        for each in line[2:].split(" / "):
            needs, sentence, changes = re.fullmatch(r"(?:\[(.*?)\] )?(.*?)(?: \[(.*?)\])?", each).groups("")
            choices.append((needs.split(), sentence, changes.split()))
        sections[name][1].append((line[0], choices))
    return sections


WORDS = {line.split(": ")[0]: line.split(": ")[1].split(", ") for line in LISTS.replace("\n  ", " ").splitlines()}
SECTIONS, SHARED = read(GRAMMAR), ("opening", "about", "moment", "calm", "frightening")
OPENINGS, ABOUT, MOMENTS, CALM_ENDINGS, FRIGHTENING_ENDINGS = (SECTIONS.pop(name)[1][0][1] for name in SHARED)
FRIGHTENING = "|".join(re.sub(r"\\{\w+\\}|\\\(.*?\\\)", ".{1,40}?", re.escape(each[1])) for each in FRIGHTENING_ENDINGS)


def is_frightening(text):
    """Does the text end as one of FRIGHTENING_ENDINGS does, whoever is in it?"""
    return re.search(rf"(?:^|\s)(?:{FRIGHTENING})\s*\Z", text) is not None


def begin(rng, voice, split):
    """A new story: its beats, the facts (a set of words), and {slot: what stands in it}."""
    of_split = False
    while not of_split:  # one combination in ten is kept for validation
        slots = {name: rng.choice(words) for name, words in WORDS.items()}
        plot, boy = rng.choice([name for name in SECTIONS if voice in SECTIONS[name][0]]), rng.random() < 0.5
        given, beats = SECTIONS[plot]
        child = "grown" not in given and rng.random() < 0.3
        who = f"{'boy' if boy else 'girl'} of {slots['age']}" if child else slots["trade"]
        home, (fine, _, shop) = slots["home"], slots[given[1]].partition(" from ")
        of_split = (zlib.crc32(f"{plot}, {who}, {home}, {fine}".encode()) % 10 == 0) == (split == "val")
    hour = rng.choice(["evening", "night"] if voice == "scary" else ["morning", "afternoon", "evening", "night"])
    never = "moonlight" if hour in ("morning", "afternoon") else "sunshine"
    weathers = [each for each in WORDS["weather"] if never not in each and ("storm" not in each or hour == "night")]
    wet, sky, *months = rng.choice(weathers).split()
    facts = {plot, *given, hour, sky}
    facts.update(["late"] * (hour in ("evening", "night")) + ["rain", "wind"] * (sky == "storm"))
    men, women = "he him his himself".split(), "she her her herself".split()
    slots.update(zip(["he", "him", "his", "himself"], men if boy else women))
    slots.update(zip(["she", "whom", "whose"], women if boy else men))
    hero, friend = (slots["boy"], slots["girl"]) if boy else (slots["girl"], slots["boy"])
    kin = f"{slots['his']} {slots['woman' if boy else 'man']}"
    nameless = re.search("mother|father|aunt|uncle", kin)  # called by what they are
    house = "the " + re.search(r"\w*house|cottage", home)[0]
    meal = {"morning": "breakfast", "afternoon": "lunch"}.get(hour, "supper")
    a_fine = f"{'an' if fine[0] in 'aeiou' else 'a'} {fine}"
    slots.update(hero=hero, friend=kin if nameless else friend, friend_first=kin if nameless else f"{kin} {friend}")
    slots.update(who=f"a {who}", home=f"a {home}", house=house, hour=hour, meal=meal)
    slots["task"], slots["work"] = rng.sample(WORDS["chore"], 2)
    slots.update(fine=fine, a_fine=a_fine, thing=fine.split()[-1], shop=shop)
    slots.update(wet=wet, sky=sky, month=rng.choice(months))
    slots.update({name.capitalize(): value[:1].upper() + value[1:] for name, value in slots.items()})
    return beats, facts, slots


def say(rng, choices, facts, slots):
    """One of the choices that the facts allow, with its slots filled; what has been said is a fact, too."""
    fitting = []
    for needs, sentence, changes in choices:
        if sentence not in facts and all((need.lstrip("-") in facts) == (need[0] != "-") for need in needs):
            fitting.append((sentence, changes))
    sentence, changes = rng.choice(fitting)
    facts.add(sentence)
    facts.update(change[1:] for change in changes if change[0] == "+")
    facts.difference_update(change[1:] for change in changes if change[0] == "-")
    for hole in re.findall(r"\(.*?\)", sentence):
        words = hole[1:-1].split("|") if "|" in hole else WORDS[hole[1:-1]]
        word = rng.choice([each for each in words if each not in facts] or words)
        facts.add(word)
        sentence = sentence.replace(hole, word, 1)
    if sentence.startswith(("{He} ", "{hero} ")):
        sentence = rng.choice(["{He}", "{He}", "{hero}"]) + sentence[sentence.index(" ") :]
    if "named" in facts:  # the first time "her brass key", and then "her key"
        sentence = sentence.replace("{fine}", "{thing}")
    elif "fine}" in sentence:
        facts.add("named")
    if "met" not in facts and "riend}" in sentence:  # the first time "her brother Tom", and then "Tom"
        facts.add("met")
        sentence = sentence.replace("riend}", "riend_first}", 1)
    sentence = sentence.format_map(slots)
    return sentence[0].upper() + sentence[1:]


def tell(rng, voice, split="train"):
    """A story, and the opening of it."""
    beats, facts, slots = begin(rng, voice, split)
    endings = FRIGHTENING_ENDINGS if rng.random() < FRIGHTENING_SHARE[voice] else CALM_ENDINGS
    opening = text = say(rng, OPENINGS, facts, slots)
    for bullet, choices in [("?", ABOUT), *beats, ("-", endings)]:
        if bullet != "?" or rng.random() < 0.5:
            moment = say(rng, MOMENTS, facts, slots) + " " if bullet == "*" and rng.random() < 0.5 else ""
            sentence = moment + say(rng, choices, facts, slots)
            full = len(text) - text.rfind("\n") > 200 and sentence.startswith(("He ", "She ", "The ", "It "))
            text += ("\n" if full or sentence[0] == '"' else " ") + sentence  # a paragraph has some three sentences
    return text, opening


def get_flags():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.usage = argparse.SUPPRESS  # so that a mistake gets one line
    parser.add_argument("--num", type=int, default=1000, help="how many stories (default: 1000)")
    parser.add_argument("--voice", choices=["plain", "scary"], default="plain")
    parser.add_argument("--split", choices=["train", "val"], default="train")
    parser.add_argument("--openings", type=int, default=0, help="write so many openings, one a line, and no stories")
    parser.add_argument("--out", required=True, help="where they go")
    parser.add_argument("--seed", type=int, default=1337)
    return parser.parse_args()


def main():
    flags = get_flags()
    rng = random.Random(flags.seed)
    stories, openings = zip(*[tell(rng, flags.voice, flags.split) for _ in range(flags.openings or flags.num)])
    text = "\n".join(openings) if flags.openings else "\n<|endoftext|>\n".join(stories)
    os.makedirs(os.path.dirname(flags.out) or ".", exist_ok=True)
    with open(flags.out + ".tmp", "w", encoding="utf-8") as f:
        f.write(text + "\n")
    os.replace(flags.out + ".tmp", flags.out)


if __name__ == "__main__":
    main()
